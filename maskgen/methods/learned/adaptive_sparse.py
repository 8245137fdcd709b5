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

With a `rank`, the correction is a low-rank one instead, S [O, R] and X [R, I] both trained: that of the checkpoint
that training starts from (`admm` with a rank, `eora`), its columns of S scaled to the size of its rows of X, as one
rate moves both; or S = 0 beside a random X, where the checkpoint has none.

Memory per prunable weight: 17 bytes (float32 weight, gradient, two moments, the mask), the teacher beside it.

Ours: pruned positions decay towards zero (the release's integer mask turned the sign round); the mask rests in the last
`settle` of the steps, so that what is exported is what was trained last, and the mask in force is exported. A run may
start from the weights and masks of a prior instead of the dense weights and their largest (`weights = "prior"`), which
is far better after few steps, and may stay with the prior's masks (`mask = "prior"`); the two go together or alone.

Source: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI 2025. Trained
low-rank matrices beside sparse weights: Mozaffari et al., "SLoPe", ICLR 2025 (arXiv 2405.16325).

Legend: O = out features, I = in features, K = runs of inputs (SLoRB), R = rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.core.correction import CorrectionConfig, LowRankCorrection, PooledCorrection
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

    def __init__(self, target: TargetLayer, method: AdaptiveSparse, generator: torch.Generator) -> None:
        super().__init__(target)
        self.method = method
        self.weight.requires_grad_(True)
        assert target.prior_OI is not None or not method.uses_prior, "methods that ask for a prior are given one"
        kept_OI = self.magnitude_mask() if target.prior_OI is None else target.prior_OI
        self.register_buffer("kept_OI", kept_OI.to(self.weight.device, copy=True))
        self.out: nn.Parameter | None = None
        self.pool: nn.Parameter | None = None
        if method.correction is None:
            return
        if target.correction is not None:
            start = _balanced(target.correction) if method.rank else target.correction
        else:
            start = self._low_rank_start(generator) if method.rank else self._slorb_start()
        self.out = nn.Parameter(start.out.to(self.weight, copy=True))
        self.pool = None if start.pool is None else nn.Parameter(start.pool.to(self.weight, copy=True))

    def _slorb_start(self) -> Correction:
        """S and X of the module docstring."""
        weight_OI, segment = self.weight.detach(), self.method.slorb_segment
        if self.in_features % segment:
            raise RecipeError(
                f"method.slorb_segment {segment}: does not divide the {self.in_features} inputs of {self.name}; "
                f"choose a divisor, such as {math.gcd(segment, self.in_features)}"
            )
        out_OK = (weight_OI * ~self.kept_OI).unflatten(1, (-1, segment)).mean(2)
        if self.method.slorb_pool == "fixed":
            return Correction(out_OK)
        return Correction(out_OK, torch.eye(self.in_features // segment).repeat_interleave(segment, dim=1))

    def _low_rank_start(self, generator: torch.Generator) -> Correction:
        """S = 0, and an X that keeps the size of inputs."""
        pool_RI = torch.randn(self.method.rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
        return Correction(torch.zeros(self.out_features, self.method.rank), pool_RI)

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
    follow the weights, or stay those of the prior. `slorb_segment` is k, or 0 for no SLoRB; `rank` is R, or 0 for no
    low-rank correction.
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
    rank: int = 0

    def __post_init__(self) -> None:
        self.require_not_negative("masked_decay", "weight_decay", "rank")
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
        if self.slorb_segment and self.rank:
            raise RecipeError(
                f"method.rank {self.rank}: a layer has one correction, and method.slorb_segment {self.slorb_segment} "
                "asks for SLoRB's; set one of them to 0"
            )

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
        """That of SLoRB, or a low-rank one."""
        if self.rank:
            return LowRankCorrection(self.rank)
        return PooledCorrection(self.slorb_segment, self.slorb_pool) if self.slorb_segment else None

    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear | None:
        """A layer that trains its own weights under a mask."""
        return AdaptiveLinear(target, self, generator)

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


def _balanced(correction: Correction) -> Correction:
    """The same product, every column of S as long as its row of X."""
    assert correction.pool is not None, "a low-rank correction stores both"
    out_R, pool_R = correction.out.norm(dim=0), correction.pool.norm(dim=1)
    scale_R = (pool_R / out_R).sqrt().where((out_R > 0) & (pool_R > 0), 1.0)
    return Correction(correction.out * scale_R, correction.pool / scale_R[:, None])


def _layers(layers: Layers) -> list[AdaptiveLinear]:
    return [layer for layer in layers.values() if isinstance(layer, AdaptiveLinear)]


METHOD = AdaptiveSparse
