"""AST: train the weights of a 2:4 model against the dense one while the mask follows the magnitudes.

    y = (m * W) x,   m = the n largest |W| of every group         refreshed every `refresh_every` steps

The gradient passes to ALL of W as if the mask were not there (straight through), so a pruned weight keeps learning and
can come back. To make masks settle, an annealed decay pushes pruned weights to zero: `maskgen.numerics.annealed_adamw`
has the update. Its lambda rises linearly to `masked_decay`, then stays. What has no mask (SLoRB, norms, embeddings)
takes plain AdamW steps; only matrices decay.

SLoRB ("boosted") adds y += S (X x), S `[O, K]`, X `[K, I]` pooling runs of k = I / K consecutive inputs. S starts at
the mean of what its run lost, S_ij = (1/k) sum_{p in run j} W_ip (1 - m_ip), so that every run of a row keeps its mean.
S trains with W; X is fixed (sums, no storage) or trained. The release's "sum" start, k times that, is worse than no
correction at all.

Memory per prunable weight: 17 bytes (float32 weight, gradient, two moments, the mask), the teacher beside it.

Ours: pruned positions decay towards zero (the release's integer mask turned the sign round); the mask rests in the last
`settle` of the steps, so that what is exported is what was trained last, and the mask in force is exported. A run may
start from the weights and masks of a prior instead of the dense weights and their largest (`weights = "prior"`), which
is far better after few steps, and may stay with the prior's masks (`mask = "prior"`); the two go together or alone.

Source: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI 2025.

Legend: O = out features, I = in features, K = runs of inputs (SLoRB).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.core.correction import CorrectionConfig, PooledCorrection
from maskgen.core.errors import RecipeError
from maskgen.methods import Correction, Solution
from maskgen.methods.learned import Layers, LearnedLinear, LearnedMethod, StepContext, TargetLayer
from maskgen.numerics.annealed_adamw import AnnealedAdamW
from maskgen.numerics.shards import full


class _StraightThrough(torch.autograd.Function):
    """m * W forwards; backwards the gradient of m * W is taken for that of W, pruned entries included."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, kept_OI: Tensor) -> Tensor:
        return weight_OI * kept_OI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class AdaptiveLinear(LearnedLinear):
    """`weight` trains under the mask `kept_OI`, a buffer, so that a resumed run goes on with the mask it had."""

    kept_OI: Tensor
    weight: nn.Parameter

    def __init__(self, target: TargetLayer, method: AdaptiveSparse) -> None:
        super().__init__(target)
        self.method = method
        self.weight.requires_grad_(True)
        assert target.prior_OI is not None or not method.uses_prior, "methods that ask for a prior are given one"
        kept_OI = self.magnitude_mask() if target.prior_OI is None else target.prior_OI
        self.register_buffer("kept_OI", kept_OI.to(self.weight.device, copy=True))
        self.out: nn.Parameter | None = None
        self.pool: nn.Parameter | None = None
        segment = method.slorb_segment
        if segment == 0:
            return
        if self.in_features % segment:
            raise RecipeError(
                f"method.slorb_segment {segment}: does not divide the {self.in_features} inputs of {self.name}; "
                f"choose a divisor, such as {math.gcd(segment, self.in_features)}"
            )
        self._add_correction(target.correction)

    def _add_correction(self, given: Correction | None) -> None:
        """Make S and X: those of the checkpoint that training goes on from, or the start of the module docstring."""
        weight_OI, segment = self.weight.detach(), self.method.slorb_segment
        if given is not None:
            self.out = nn.Parameter(given.out.to(weight_OI))
            self.pool = None if given.pool is None else nn.Parameter(given.pool.to(weight_OI))
            return
        lost_OI = weight_OI * ~self.kept_OI
        self.out = nn.Parameter(lost_OI.unflatten(1, (-1, segment)).mean(2))
        if self.method.slorb_pool == "trained":
            runs_K = torch.eye(self.in_features // segment, dtype=weight_OI.dtype, device=weight_OI.device)
            self.pool = nn.Parameter(runs_K.repeat_interleave(segment, dim=1))

    def pruned(self) -> tuple[Tensor, float]:
        """The current mask, and lambda in the current step."""
        risen = min(1.0, self.context.step / max(1.0, self.method.ramp * self.context.steps))
        return self.kept_OI, self.method.masked_decay * risen

    def magnitude_mask(self) -> Tensor:
        """The n largest |W| of every group."""
        return self.pattern.mask_from_scores(full(self.weight.detach()).abs())

    def train_forward(self, x: Tensor) -> Tensor:
        """(m * W) x + S (X x) + b, with dense gradients for W."""
        return self._corrected(x, dense_linear(x, _StraightThrough.apply(self.weight, self.kept_OI), self.bias))

    def hard_forward(self, x: Tensor) -> Tensor:
        """The same numbers: this layer is never relaxed."""
        return self._corrected(x, super().hard_forward(x))

    def mask(self) -> Tensor:
        """The current mask, which is the one to export."""
        return self.kept_OI.clone()

    def solution(self) -> Solution:
        """The mask, the trained weights (0 where pruned), and S and X."""
        mask_OI = self.mask()
        weight_OI = full(self.weight.detach()) * mask_OI
        if self.out is None:
            return Solution(mask_OI, weight_OI)
        pool_KI = None if self.pool is None else full(self.pool.detach())
        return Solution(mask_OI, weight_OI, Correction(full(self.out.detach()), pool_KI))

    def _corrected(self, x: Tensor, y: Tensor) -> Tensor:
        if self.out is None:
            return y
        if self.pool is None:
            pooled = x.unflatten(-1, (-1, self.method.slorb_segment)).sum(-1)
        else:
            pooled = dense_linear(x, self.pool)
        return y + dense_linear(pooled, self.out)


@dataclass(frozen=True)
class AdaptiveSparse(LearnedMethod):
    """Options. `masked_decay` is lambda after its rise, which takes the fraction `ramp` of the steps.

    The mask stays the same in the last `settle` of the steps (a fraction). `weights` says which ones training starts
    from: the dense model's, under masks of the largest, or the prior's, under its masks. `mask` says whether masks then
    follow the weights, or stay those of the prior. `slorb_segment` is k, or 0 for no SLoRB.
    """

    trains_weights: ClassVar[bool] = True

    masked_decay: float = 5e-4
    ramp: float = 0.25
    settle: float = 0.1
    refresh_every: int = 10
    weights: str = "dense"
    mask: str = "adaptive"
    second_moment: str = "decayed"
    weight_decay: float = 0.05
    slorb_segment: int = 0
    slorb_pool: str = "fixed"

    def __post_init__(self) -> None:
        self.require_not_negative("masked_decay", "weight_decay")
        self.require_not_negative("ramp", "settle", most=1)
        self.require_one_of(
            weights=("dense", "prior"),
            mask=("adaptive", "prior"),
            second_moment=("decayed", "raw"),
            slorb_pool=("fixed", "trained"),
        )
        if self.refresh_every < 1:
            raise RecipeError(f"method.refresh_every {self.refresh_every}: expected 1 or more steps")
        if self.slorb_segment < 0:
            raise RecipeError(f"method.slorb_segment {self.slorb_segment}: expected inputs per run, or 0 for no SLoRB")

    @property
    def uses_prior(self) -> bool:
        """Whether masks start as those of a prior."""
        return "prior" in (self.weights, self.mask)

    @property
    def uses_prior_weights(self) -> bool:
        """Whether `weights` is "prior"."""
        return self.weights == "prior"

    @property
    def correction(self) -> CorrectionConfig | None:
        """That of SLoRB."""
        return PooledCorrection(self.slorb_segment, self.slorb_pool) if self.slorb_segment else None

    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear | None:
        """A layer that trains its own weights under a mask."""
        return AdaptiveLinear(target, self)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """`AnnealedAdamW` of everything."""
        targets = _layers(layers)
        parameters = [item for layer in targets for item in (layer.weight, layer.out, layer.pool) if item is not None]
        pruned = {layer.weight: layer.pruned for layer in targets}
        return AnnealedAdamW([*parameters, *others], pruned, lr, self.weight_decay, self.second_moment == "raw")

    def before_step(self, layers: Layers, context: StepContext) -> None:
        """Choose the masks again every `refresh_every` steps, but not in the last `settle` of them. S is not reset.

        In the first step they are what the run starts from.
        """
        resting = context.step == 0 or context.step >= (1 - self.settle) * context.steps
        if self.mask == "prior" or resting or context.step % self.refresh_every:
            return
        for layer in _layers(layers):
            layer.kept_OI.copy_(layer.magnitude_mask())


def _layers(layers: Layers) -> list[AdaptiveLinear]:
    return [layer for layer in layers.values() if isinstance(layer, AdaptiveLinear)]


METHOD = AdaptiveSparse
