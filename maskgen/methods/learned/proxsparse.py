"""ProxSparse: train with a penalty on the third and fourth largest weight of each group; keep the two largest.

The weights learn by proximal gradient descent on

    L(W) + lambda1 sum_g R(w_g) + lambda2 Reg0(W)
    R(w)    = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|        0 iff at most two of the four are not 0
    Reg0(W) = || W / (W0 + eps sgn W0) * (W - W0) ||^2,  sgn 0 = 1      0 where a weight is what it was, or gone

An AdamW step stands in for the gradient step of L + lambda2 Reg0; then, once per optimiser step, every group v is
replaced by prox(v) = argmin_w 0.5 ||w - v||^2 + lambda1 R(w). At the end the mask is the two largest |w| of each group,
and it is put on the ORIGINAL weights: what was learned is thrown away, so this counts as "no weight update", and the
teacher of a distillation is the original layer, at no cost in memory.

The prox is exact. Its minimiser has the signs and the order of v, so it is found for z = |v| sorted downwards, as the
best of three candidates: (z1, z2, 0, 0); the fixed point of z_i <- max(0, z_i - lambda1 e2(others)) on the three
largest; and the same on all four, where e2 sums the products of pairs. Both iterations start at zero and sweep from the
smallest entry up. A sweep contracts the error by about 2 lambda1 max|w|, which is 0.01 to 0.1 in real runs, so a few
sweeps reach float32. Groups that need more (lambda1 z1 near 0.9) are swept on by themselves.

Most groups need less. Entry (i, j) of the Hessian is lambda1 times the sum of the two other weights, so a row's entries
off the diagonal sum to 2 lambda1 (w_j + w_k + w_l) <= 6 lambda1 z1, against 1 on it: below lambda1 z1 = 1/6 the problem
is convex, its only fixed point on all four is the minimum, and neither candidates nor order matter.

How strong: only the products lambda1 |w| and rho = lambda1 T sigma matter, with sigma the root mean square of the
prunable weights and T the number of steps. So lambda1 = c lr / sigma^2, where c (`strength`) compares one shrink of a
third weight with one Adam step, and rho should be 3 or more, or groups are still undecided at the end. lambda1 is NOT
multiplied by the schedule of the learning rate: the shrink is the same in warm-up and at the end, as published.

Memory per prunable weight: 16 bytes (float32 copy, gradient, two Adam moments) beside the frozen weight.

Ours: the rule for lambda1; float32 where the release computes in bfloat16; a tolerance per group where it tests one
sum; what is not pruned stays frozen (the release trains it and then throws it away).

Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs", ICML 2025.

Legend: O = out features, I = in features, G = groups, R = entries of a group taking part (3 or 4).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear
from torch.utils.checkpoint import checkpoint

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import Layers, LearnedLinear, LearnedMethod, StepContext, TargetLayer
from maskgen.numerics.memory import chunk_elements
from maskgen.numerics.shards import full, local

GROUP = 4
NETWORK = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2))
"""Comparisons that sort four numbers."""

CHUNK_GROUPS = 1 << 17
"""Groups handled at once on a CPU, 300 bytes each: the workspace stays below 40 MB whatever the layer.

An accelerator takes what fills it (2.6 GB at most), since a chunk is some hundred kernels whatever its size.
"""

SWEEPS, ROUNDS = 4, 50
"""A round is 4 sweeps over the groups that have not converged. At real strengths the first is the only one."""

TOLERANCE = 5e-7
"""A group has converged when a sweep moves none of its entries by more than this, relative to its largest."""

CONVEX_BELOW = 1 / 6
"""lambda1 z1 below which a group has one minimum."""

MIN_RHO = 3.0
"""Below this many total shrinks lambda1 T sigma, more than 4 % of Gaussian groups keep three or four weights."""

_log = logging.getLogger(__name__)


def reg24(weight_OI: Tensor) -> Tensor:
    """R of every group, `[O, I] -> [O, I / 4]`: 0 exactly where at most two of the four are not 0."""
    a, b, c, d = weight_OI.abs().unflatten(1, (-1, GROUP)).unbind(2)
    return a * b * (c + d) + c * d * (a + b)


def reg0(weight_OI: Tensor, original_OI: Tensor, eps: float) -> Tensor:
    """Reg0, a scalar: the penalty on weights that are neither what they were nor 0."""
    sign_OI = torch.where(original_OI < 0, -1.0, 1.0)
    return (weight_OI / (original_OI + eps * sign_OI) * (weight_OI - original_OI)).square().sum()


def prox(values: Tensor, lambda1: float) -> Tensor:
    """argmin_w 0.5 ||w - v||^2 + lambda1 R(w) for every group of four consecutive numbers of the last dimension.

    Float32 in and out, any shape whose last size is a multiple of 4, any device.
    """
    chunks = values.reshape(-1, GROUP).split(_chunk_groups(values.device))
    parts = [_prox_chunk(v_GR.T, lambda1).T for v_GR in chunks]
    return torch.cat(parts).view(values.shape)


def _chunk_groups(device: torch.device) -> int:
    return CHUNK_GROUPS if device.type == "cpu" else chunk_elements(device) // GROUP


def _prox_chunk(v_RG: Tensor, lambda1: float) -> Tensor:
    """`prox` of groups that are columns, `[4, G]`: by fixed point alone where the problem is convex."""
    z_RG = v_RG.abs().contiguous()
    w_RG = torch.empty_like(z_RG)
    convex_G = lambda1 * z_RG.amax(0) < CONVEX_BELOW
    for some_G, solve in ((convex_G, _fixed_point), (~convex_G, _best_of_three)):
        some_g = some_G.nonzero().squeeze(1)
        if len(some_g):
            w_RG[:, some_g] = solve(z_RG[:, some_g], lambda1)
    return w_RG.copysign_(v_RG)


def _best_of_three(z_RG: Tensor, lambda1: float) -> Tensor:
    """The minimiser for non-negative groups `[4, G]` in any order."""
    z_RG, swapped = _sort(z_RG)
    best_RG = torch.cat([z_RG[:2], torch.zeros_like(z_RG[2:])])
    cost_G = _objective(best_RG, z_RG, lambda1)
    for entries in (3, 4):
        w_RG = torch.cat([_fixed_point(z_RG[:entries], lambda1), torch.zeros_like(z_RG[entries:])])
        other_G = _objective(w_RG, z_RG, lambda1)
        better_G = other_G < cost_G
        best_RG, cost_G = torch.where(better_G, w_RG, best_RG), torch.where(better_G, other_G, cost_G)
    return _unsort(best_RG, swapped)


def _sort(z_RG: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Columns sorted downwards, and which of them each comparison of `NETWORK` swapped."""
    rows, swapped = list(z_RG), []
    for i, j in NETWORK:
        swapped.append(rows[i] < rows[j])
        rows[i], rows[j] = torch.maximum(rows[i], rows[j]), torch.minimum(rows[i], rows[j])
    return torch.stack(rows), swapped


def _unsort(w_RG: Tensor, swapped: list[Tensor]) -> Tensor:
    """`NETWORK` run backwards."""
    rows = list(w_RG)
    for (i, j), swap_G in zip(reversed(NETWORK), reversed(swapped), strict=True):
        rows[i], rows[j] = torch.where(swap_G, rows[j], rows[i]), torch.where(swap_G, rows[i], rows[j])
    return torch.stack(rows)


def _objective(w_RG: Tensor, z_RG: Tensor, lambda1: float) -> Tensor:
    """0.5 ||w - z||^2 + lambda1 R(w) of non-negative groups, `[4, G] -> [G]`."""
    a, b, c, d = w_RG
    return 0.5 * (w_RG - z_RG).square().sum(0) + lambda1 * (a * b * (c + d) + c * d * (a + b))


def _fixed_point(z_RG: Tensor, lambda1: float) -> Tensor:
    """The fixed point of w_i = max(0, z_i - lambda1 e2(others)) that sweeps from zero lead to, `[R, G]`.

    Rounds go on for the groups `g` still moving, so the answer for a group does not depend on its neighbours.
    """
    w_RG, near_G = torch.zeros_like(z_RG), TOLERANCE * z_RG.amax(0)
    moving_g = (_sweep(w_RG, z_RG, lambda1) > near_G).nonzero().squeeze(1)
    for _ in range(1, ROUNDS):
        if not len(moving_g):
            break
        w_Rg = w_RG[:, moving_g]
        still_g = _sweep(w_Rg, z_RG[:, moving_g], lambda1) > near_G[moving_g]
        w_RG[:, moving_g] = w_Rg
        moving_g = moving_g[still_g]
    return w_RG


def _sweep(w_RG: Tensor, z_RG: Tensor, lambda1: float) -> Tensor:
    """`SWEEPS` of coordinate descent in place, last entry first; how far the last one moved any entry, `[G]`."""
    before_RG = w_RG
    for sweep in range(SWEEPS):
        if sweep == SWEEPS - 1:
            before_RG = w_RG.clone()
        for i in reversed(range(len(z_RG))):
            a_G, b_G, *rest = (w_RG[j] for j in range(len(z_RG)) if j != i)
            e2_G = a_G * b_G
            for c_G in rest:
                e2_G = torch.addcmul(e2_G, a_G + b_G, c_G)
            torch.sub(z_RG[i], e2_G, alpha=lambda1, out=w_RG[i]).clamp_(min=0)
    return (w_RG - before_RG).abs_().amax(0)


class ProxSparseLinear(LearnedLinear):
    """`learned` `[O, I]` is the float32 copy that trains; `weight` stays what it was, in its stored dtype."""

    def __init__(self, target: TargetLayer) -> None:
        super().__init__(target)
        self.learned = nn.Parameter(self.weight.detach().to(torch.float32, copy=True))
        self.square_sum = float(self.learned.detach().square().sum(dtype=torch.float64))
        self.lambda1 = self.sigma = 0.0

    def train_forward(self, x: Tensor) -> Tensor:
        """The dense layer with the learned weights: the penalty, not the forward pass, is what makes them sparse."""
        return dense_linear(x, self.learned.to(x.dtype), self.bias)

    def mask(self) -> Tensor:
        """The two largest |learned weights| of every group."""
        return self.pattern.mask_from_scores(full(self.learned.detach()).abs())


@dataclass(frozen=True)
class ProxSparse(LearnedMethod):
    """`strength`: c of lambda1 = c lr / sigma^2, unless `lambda1` is given (> 0). `lambda2`, `eps`: Reg0; 0 is off."""

    trains_weights: ClassVar[bool] = False

    strength: float = 1.0
    lambda1: float = 0.0
    lambda2: float = 0.0
    eps: float = 0.5

    def __post_init__(self) -> None:
        self.require_not_negative("strength", "lambda1", "lambda2")
        self.require_positive("eps")
        if self.strength == 0 and self.lambda1 == 0:
            raise RecipeError("method.strength and method.lambda1 are both 0: nothing would become sparse; set one")

    def check_pattern(self, pattern: NMPattern) -> None:
        """`RecipeError` unless the pattern is 2:4, for which the penalty and its proximal map are defined."""
        if (pattern.n, pattern.m) != (2, 4):
            raise RecipeError(f"pattern {pattern}: proxsparse is defined for 2:4 only; set pattern = '2:4'")

    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear | None:
        """A layer that trains a float32 copy of its weight."""
        return ProxSparseLinear(target)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """AdamW without weight decay, and lambda1 by the rule from sigma of the weights as they were given."""
        if others:
            raise RecipeError("train.scope: proxsparse serves the original model, masked; set it to 'targets'")
        targets = _layers(layers)
        sigma = math.sqrt(sum(layer.square_sum for layer in targets) / sum(layer.weight.numel() for layer in targets))
        lambda1 = self.lambda1 or self.strength * lr / sigma**2
        for layer in targets:
            layer.lambda1, layer.sigma = lambda1, sigma
        return torch.optim.AdamW([layer.learned for layer in targets], lr, weight_decay=0.0)

    def regulariser(self, layers: Layers, context: StepContext) -> Tensor | None:
        """lambda2 Reg0, recomputed layer by layer in the backward pass."""
        if self.lambda2 == 0:
            return None
        targets = _layers(layers)
        terms = [checkpoint(reg0, layer.learned, layer.weight, self.eps, use_reentrant=False) for layer in targets]
        return self.lambda2 * full(torch.stack(terms).sum())

    def before_step(self, layers: Layers, context: StepContext) -> None:
        """Warn in the first step if the run is too short or the penalty too weak for groups to end at 2:4."""
        layer = _layers(layers)[0]
        rho = layer.lambda1 * context.steps * layer.sigma
        if context.step == 0 and rho < MIN_RHO:
            _log.warning(
                "proxsparse: rho = lambda1 * steps * sigma = %.3g * %d * %.3g = %.2g is below %g, so many groups will "
                "still have more than two weights at the end; raise method.strength, train.lr or train.steps",
                layer.lambda1, context.steps, layer.sigma, rho, MIN_RHO,
            )  # fmt: skip

    def after_step(self, layers: Layers, context: StepContext, lr: float) -> None:
        """The proximal map, with the same lambda1 whatever the learning rate is now."""
        for layer in _layers(layers):
            rows_OI = local(layer.learned)
            rows_OI.copy_(prox(rows_OI, layer.lambda1))


def _layers(layers: Layers) -> list[ProxSparseLinear]:
    return [layer for layer in layers.values() if isinstance(layer, ProxSparseLinear)]


METHOD = ProxSparse
