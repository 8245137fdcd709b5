"""MaskLLM: learn which pattern every group follows, by sampling patterns while the weights stay as they are.

A group of m columns has P = C(m, n) legal patterns S_p (6 for 2:4, in the order of `NMPattern.candidates`), and one
logit pi_p for each. Training minimises the language-model loss over samples of the mask, minus a reward for keeping
large weights, without which the gradients of what is pruned vanish and the mask stays near its prior:

    y_p  = softmax_p( (kappa pi_p + gumbel_p) / tau )        M = sum_p y_p S_p: in [0, 1], n per group
    loss = L(x; W * M) - lambda |W * M|^2 / |W|^2            |.|^2 summed over the whole model

kappa grows (100 -> 500) and tau falls (4 -> 0.05), so that samples become hard and stop changing; lambda falls linearly
to 0 in the last step. What is exported and evaluated is argmax_p pi_p, ties going to the earlier pattern. A prior mask
M0 puts the logits at pi_p = alpha sigma (<M0, S_p> - n^2 / m), for 2:4 alpha sigma times 1, 0 or -1.

Two compact forms give every column, not every pattern, a logit theta (4 for 2:4, two thirds of the memory):

    additive     pi_p = sum of theta over the columns p keeps, then as above: the same softmax over fewer parameters
    reservoir    n columns drawn one after the other without replacement (RoI): keys k = kappa theta + gumbel,
                 mu_1 = softmax(k / tau), k += log(1 - mu_1), mu_2 = softmax(k / tau), ...; M = mu_1 + mu_2 + ...
                 While soft, an entry of M may exceed 1; a group sums to n always.

With few steps, soft masks are a detour: they train a model that is not the one exported, and until they have hardened,
the weights under them fit no better than the prior's. `estimator = "straight_through"` (Jang et al., "Categorical
Reparameterization with Gumbel-Softmax", ICLR 2017) takes the pattern with the highest kappa pi_p + gumbel_p itself, and
as its gradient that of y.

Memory. Plain autograd keeps y, M and W * M of every layer until the backward pass. Here the backward pass draws the
noise again from its seed and recomputes them, a chunk of rows at a time, so that beside logits, gradients and optimiser
states only one layer's W * M and dL/d(W * M) exist. AdamW's moments are kept in bfloat16 (`maskgen.numerics.adamw`).

Where this deviates from the paper: tau falls exponentially by default (the paper: linearly); the reward is divided by
|W|^2, so that lambda does not depend on the size of the model (`reward_form = "sum"` is the published form, with lambda
1e-5); the prior is added without noise (the paper draws pi ~ N(0, sigma^2) first, which loses 5.5 % of the prior's
choices at alpha = 3: `init_noise`); noise is a function of the step, so a resumed run draws the same.

Sources: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", NeurIPS 2024; the
reservoir form is RoI's, with kappa = 1 / lambda growing exponentially from 1 to 500 over the first 75 % of the steps.

Legend: T = tokens, O = out features, I = in features, G = groups per row, m = columns per group, P = patterns,
L = logits per group (P or m), o = rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.core.digest import derive_seed
from maskgen.core.errors import PatternError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import Layers, LearnedLinear, LearnedMethod, StepContext, TargetLayer, learned_parameters
from maskgen.numerics.adamw import CompactAdamW
from maskgen.numerics.mask_sample import FORMS, MaskSample
from maskgen.numerics.shards import full


class SoftLinear(torch.autograd.Function):
    """(x, logits, W) -> y = x (W * M)^T and |W * M|^2, differentiable in x and the logits; the weight is frozen.

    y has the dtype of the products: autocast's where it is on, else x's. Nothing of the mask is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, logits_OLG: Tensor, weight_OI: Tensor, sample: MaskSample
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        ctx.sample, ctx.x_dtype = sample, x.dtype
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
        ctx.save_for_backward(x, logits_OLG, weight_OI)
        with torch.autocast(device, enabled=False):
            masked_OI = torch.empty_like(weight_OI, dtype=x.dtype)
            energy = logits_OLG.new_zeros(())
            for rows, noise in sample.chunks(logits_OLG):
                masked_oI = weight_OI[rows] * sample.mask(logits_OLG[rows], noise)
                masked_OI[rows] = masked_oI
                energy += masked_oI.square_().sum()
            return dense_linear(x, masked_OI), energy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        dy, denergy = grads
        x, logits_OLG, weight_OI = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dmasked_OI = dy.flatten(0, -2).T @ x.flatten(0, -2)
            masked_OI = torch.empty_like(dmasked_OI)
            dlogits_OLG = torch.empty_like(logits_OLG)
            for rows, noise in ctx.sample.chunks(logits_OLG):
                with torch.enable_grad():
                    logits_oLG = logits_OLG[rows].detach().requires_grad_()
                    masked_oI = weight_OI[rows] * ctx.sample.mask(logits_oLG, noise)
                masked_OI[rows] = masked_oI.detach()
                dmasked_oI = torch.addcmul(dmasked_OI[rows], 2 * denergy, masked_oI.detach())
                (dlogits_OLG[rows],) = torch.autograd.grad(masked_oI, logits_oLG, dmasked_oI)
            dx = (dy @ masked_OI).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
            return dx, dlogits_OLG, None, None


class MaskLLMLinear(LearnedLinear):
    """`logits` `[O, L, G]`: L = P for the categorical form, m for the compact ones. Rows are the weight's rows."""

    patterns_Pm: Tensor

    def __init__(self, target: TargetLayer, method: MaskLLM, generator: torch.Generator) -> None:
        super().__init__(target)
        self.method = method
        device, pattern = self.weight.device, self.pattern
        self.register_buffer("patterns_Pm", pattern.candidates().to(device, torch.float32), persistent=False)
        theta_OmG = torch.zeros(self.out_features, pattern.m, self.in_features // pattern.m, device=device)
        if target.prior_OI is not None and method.uses_prior:
            prior_OmG = target.prior_OI.to(device, torch.float32).unflatten(1, (-1, pattern.m)).transpose(1, 2)
            theta_OmG += (prior_OmG - pattern.density) * (method.prior_strength * method.init_std)
        logits_OLG = self.patterns_Pm @ theta_OmG if method.logits == "categorical" else theta_OmG
        if method.init_noise:
            logits_OLG += torch.randn(logits_OLG.shape, generator=generator).to(device) * method.init_std
        self.logits = nn.Parameter(logits_OLG)
        self.dense_energy = float(torch.linalg.vector_norm(self.weight.detach(), dtype=torch.float32)) ** 2
        self.energy: Tensor | None = None

    def sample(self) -> MaskSample:
        """The random mask of the current step."""
        method, context = self.method, self.context
        sharpness = method.scale(context), method.temperature(context)
        seed = derive_seed(context.noise_seed, self.index)
        hard = method.estimator == "straight_through"
        return MaskSample(method.logits, self.pattern, self.patterns_Pm, *sharpness, seed, hard)

    def train_forward(self, x: Tensor) -> Tensor:
        """`[..., I] -> [..., O]` with the sampled mask; leaves |W * M|^2 in `energy` for the reward."""
        y, energy = SoftLinear.apply(x, self.logits, self.weight, self.sample())
        recomputing = torch._C._current_graph_task_id() != -1  # in a backward pass; energy would keep all of its block
        self.energy = None if recomputing else energy
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def mask(self) -> Tensor:
        """The most probable pattern of every group."""
        logits_OLG = full(self.logits.detach())
        if self.method.logits != "categorical":
            return self.pattern.mask_from_scores(logits_OLG.transpose(1, 2).flatten(1))
        return self.patterns_Pm.bool()[logits_OLG.argmax(1)].flatten(1)


RAMPS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, progress: start * (1 - progress) + end * progress,
    "exponential": lambda start, end, progress: start * (end / start) ** progress,
}
CHOICES: dict[str, Collection[str]] = {
    "logits": FORMS,
    "estimator": ("soft", "straight_through"),
    "scale_growth": RAMPS,
    "temperature_decay": RAMPS,
    "reward_form": ("normalised", "sum"),
    "moments": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class MaskLLM(LearnedMethod):
    """Options. `prior_strength` (alpha) and `init_std` (sigma) say how far a prior moves the logits; 0 means no prior.

    `weight_reward` lambda is for the form `reward_form`: "normalised" by |W|^2, or the published "sum". Scale and
    temperature arrive at their ends after the fraction `anneal` of the steps. `moments`: dtype of AdamW's states.
    `estimator`: train through soft masks, or legal ones with the gradient of soft ones ("straight_through").
    """

    logits: str = "categorical"
    estimator: str = "soft"
    prior_strength: float = 3.0
    init_std: float = 0.01
    init_noise: bool = False
    scale_start: float = 100.0
    scale_end: float = 500.0
    scale_growth: str = "linear"
    temperature_start: float = 4.0
    temperature_end: float = 0.05
    temperature_decay: str = "exponential"
    anneal: float = 1.0
    weight_reward: float = 1.0
    reward_form: str = "normalised"
    weight_decay: float = 0.1
    adam_eps: float = 1e-8
    moments: str = "bfloat16"

    def __post_init__(self) -> None:
        self.require_one_of(**CHOICES)
        self.require_positive("init_std", "scale_start", "scale_end", "temperature_start", "temperature_end", "anneal")
        self.require_not_negative("prior_strength", "weight_reward", "weight_decay", "adam_eps")

    def check_pattern(self, pattern: NMPattern) -> None:
        """`RecipeError` for a pattern with too many candidates per group to enumerate."""
        try:
            pattern.candidates()
        except PatternError as error:
            raise RecipeError(f"method.logits {self.logits!r}: {error}") from None

    @property
    def uses_prior(self) -> bool:
        """Whether logits start from a prior mask."""
        return self.prior_strength > 0

    def scale(self, context: StepContext) -> float:
        """kappa, the factor of the logits in this step."""
        return RAMPS[self.scale_growth](self.scale_start, self.scale_end, min(1.0, context.progress / self.anneal))

    def temperature(self, context: StepContext) -> float:
        """tau, the temperature of the softmax in this step."""
        progress = min(1.0, context.progress / self.anneal)
        return RAMPS[self.temperature_decay](self.temperature_start, self.temperature_end, progress)

    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear:
        """A layer that learns logits beside its frozen weight."""
        return MaskLLMLinear(target, self, generator)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """AdamW on the logits. Raises `RecipeError` if anything else is to be trained: weights are frozen here."""
        if others:
            raise RecipeError("train.scope: maskllm learns masks for frozen weights; use scope = 'targets'")
        options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": self.adam_eps, "weight_decay": self.weight_decay}
        if self.moments == "bfloat16":
            return CompactAdamW(learned_parameters(layers), lr, **options)
        return torch.optim.AdamW(learned_parameters(layers), lr, fused=True, **options)

    def regulariser(self, layers: Layers, context: StepContext) -> Tensor | None:
        """-lambda times |W * M|^2 of the last forward pass, summed over the layers; their `energy` becomes None."""
        ours = cast(Mapping[str, MaskLLMLinear], layers).values()
        energies = [layer.energy.to(torch.float32) for layer in ours if layer.energy is not None]
        for layer in ours:
            layer.energy = None
        if self.weight_reward == 0:
            return None
        dense = sum(layer.dense_energy for layer in ours) if self.reward_form == "normalised" else 1.0
        return torch.stack(energies).sum() * (-self.weight_reward * (1 - context.progress) / dense)


METHOD = MaskLLM
