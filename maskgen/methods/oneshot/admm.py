"""ADMM: find the best values of the weights that stay, for a mask from elsewhere or for one chosen on the way.

With a mask M fixed, the best weights of a row solve a least-squares problem: min over w on M of (w - w0)^T H (w - w0),
H = X^T X. Exact solutions need one factorisation per row. ADMM needs one for all rows: it alternates between a
minimiser that ignores the mask and a projection onto the mask, and a dual variable U makes the two agree in the end.

    features to unit norm   n_j = sqrt(H_jj),  H~ = D^-1 H D^-1 + damp * mean(diag) * I,  W~ = W D,  D = diag(n)
    repeat                  Z  = (W~ + U) * M
                            U += W~ - Z
                            W~ = W~_0 + rho (Z - U - W~_0) (H~ + rho I)^-1
    at last                 W  = (W~ + U) * M  D^-1

The paper writes the minimiser as (W~_0 H~ + rho (Z - U)) (H~ + rho I)^-1, which is the same W~. Only as a step away
from W~_0 does it add no rounding where there is nothing to repair, and it needs one product less.

Scaling features makes rho = 1 right for every layer, and makes the first |W~| Wanda's score. When the mask is to be
chosen (`mask = "own"`), it is chosen again from |W~ + U| in each of the first `ramp` iterations, while sparsity rises
as 1 - (1 - t / ramp)^3 towards the pattern's, so that a weight which compensates for dropped ones is judged by its new
value. A weight that the pattern's own mask of these scores keeps is not dropped in that iteration.

Deviation: the ramp ranks weights within their row, not within the whole matrix, because rows are separate problems; so
scaling a row changes nothing. With `mask = "prior"` the mask is given, and this is the cheap repair after any method
(`maskgen run admm --prior MASKS --set method.mask=prior`).

With `asymmetric`, the weights W_0 that are aimed at are not the layer's own but those that would put out what the layer
puts out in the dense model (`maskgen.numerics.statistics.aimed_at_dense`): the present inputs carry the errors of all
layers before it, and this layer can undo a part of them. A layer that adds to the residual stream also makes up for
what the stream itself lacks. The ridge keeps W_0 from fitting what few tokens say by accident: with a small one, texts
that were not calibrated on get worse.

With a `rank`, the layer gets a low-rank correction B A beside its sparse weights Z, and both are solved for together:
min ||(W_0 - Z - B A) X|| where a correction of what is left over afterwards (`eora`) would take Z as it is.

    first     Z by ADMM alone, then the best B A for it: what `admm` and `eora` make in turn
    a round   ADMM from the start, mask included, with W_0 - B A in place of W_0; after each Z, B is improved by a step
              of orthogonal iteration for what Z leaves over. Kept if less is left, else the rounds are over.
    at last   Z by least squares on its mask beside B A, then the best B A beside Z as it is stored

Sparse weights give up what the correction can hold, and masks are chosen by what it cannot. Alternating from outside
(HASSLE-free) goes slower: four rounds that improve B A inside gain more than eight that leave it fixed meanwhile.

Features that were never active constrain nothing: they are dropped first, and where a given mask keeps them they keep
their weights. Workspace: three float32 matrices `[I, I]` (five with `asymmetric`) beside five of the weight's size
(nine with a `rank`).

Sources: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024; for asymmetric
calibration Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", ICML 2025; for
sparse plus low rank Makni et al., "HASSLE-free: A Unified Framework for Sparse plus Low-Rank Matrix Decomposition for
LLMs", CPAL 2025 (arXiv 2502.00899), and "3BASiL: An Algorithmic Framework for Sparse plus Low-Rank Compression of
LLMs", NeurIPS 2025 (arXiv 2603.01376), which has the correction as a third block of ADMM.

Legend: T = tokens, O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import AimedMethod, Correction, Solution
from maskgen.numerics.low_rank import low_rank, nearer_low_rank
from maskgen.numerics.masked_least_squares import solve_on_mask
from maskgen.numerics.statistics import Gram, aimed_at_dense, shifted_inverse, unit_features

_POLISH_STEPS = 20
"""Of least squares on the mask, at last."""


@dataclass(frozen=True)
class ADMM(AimedMethod):
    """`mask`: "own" chooses a mask during the first `ramp` of `iterations`, "prior" uses the one in `--prior`.

    `damp`: this fraction of the Hessian's mean diagonal is added to it; `rho`: weight of the penalty on entries outside
    of the mask, relative to the Hessian of unit features. `asymmetric`: aim at what the dense model puts out, with
    this `ridge`. `rank`: R of the correction, the same for every layer, which then stores R * (O + I) more numbers; 0
    for none. `rounds`: how often mask, weights and correction are solved for together, at most.
    """

    mask: str = "own"
    asymmetric: bool = False
    ridge: float = 1.0
    damp: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    ramp: int = 15
    rank: int = 0
    rounds: int = 4

    def __post_init__(self) -> None:
        self.require_one_of(mask=("own", "prior"))
        self.require_positive("damp", "rho", "ridge", "rounds")
        self.require_not_negative("rank")
        if not 1 <= self.ramp <= self.iterations:
            raise RecipeError(
                f"method.ramp {self.ramp}: expected at least 1 and at most method.iterations ({self.iterations})"
            )

    @property
    def correction(self) -> LowRankCorrection | None:
        """Of this rank, if there is one."""
        return LowRankCorrection(self.rank) if self.rank else None

    def solve(self, weight_OI: Tensor, stats: Gram, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """The mask and the repaired weights (float32, zero where pruned): with a `rank`, those to go with a
        correction."""
        assert (prior_OI is not None) == self.uses_prior
        norm_I, alive_I, hessian_II = self._damped(stats)
        start_OI = aimed_at_dense(weight_OI, stats, self.ridge) * norm_I
        inverse_II = shifted_inverse(hessian_II, self.rho, "damp or method.rho")
        problem = _Problem(start_OI, hessian_II, inverse_II, alive_I, pattern, prior_OI)
        mask_OI, kept_OI, _ = self._iterate(problem)
        if self.rank:
            mask_OI, kept_OI = self._solve_jointly(problem, mask_OI, kept_OI)
        return Solution(mask_OI, kept_OI / norm_I)

    def correct(self, weight_OI: Tensor, served_OI: Tensor, stats: Gram) -> Correction:
        """B `[O, R]` with orthonormal columns as `out`, A `[R, I]` as `pool`."""
        norm_I, alive_I, hessian_II = self._damped(stats)
        error_OI = (aimed_at_dense(weight_OI, stats, self.ridge) - served_OI) * norm_I
        out_OR, pool_RI = low_rank(error_OI, _of_alive(hessian_II, alive_I), self.rank)
        return Correction(out_OR.float(), (pool_RI / norm_I).float())

    def _damped(self, stats: Gram) -> tuple[Tensor, Tensor, Tensor]:
        """Norms of the features `[I]`, which are alive `[I]`, and the damped Hessian of unit features `[I, I]`."""
        norm_I, alive_I, hessian_II = unit_features(stats.sum_II)
        hessian_II.diagonal().add_(self.damp * hessian_II.diagonal().mean())
        return norm_I, alive_I, hessian_II

    def _iterate(self, problem: _Problem, low: _LowRank | None = None) -> tuple[Tensor, Tensor, _LowRank | None]:
        """ADMM from the start: the mask, the weights of unit features, 0 where pruned, and a better `low`."""
        prior_OI, start_OI = problem.prior_OI, problem.start_OI
        mask_OI = torch.ones_like(start_OI, dtype=torch.bool) if prior_OI is None else prior_OI
        target_OI = start_OI if low is None else start_OI - low.dense_OI
        free_OI, dual_OI = target_OI, torch.zeros_like(start_OI)
        for iteration in range(self.iterations):
            total_OI = free_OI + dual_OI
            if prior_OI is None and iteration < self.ramp:
                progress = 1 - (1 - (iteration + 1) / self.ramp) ** 3
                mask_OI = _ramped_mask(total_OI.abs() * problem.alive_I, problem.pattern, progress)
            kept_OI = total_OI * mask_OI
            dual_OI = total_OI - kept_OI
            if low is not None:
                low = low.nearer(start_OI - kept_OI)
                target_OI = start_OI - low.dense_OI
            free_OI = target_OI + self.rho * (kept_OI - dual_OI - target_OI) @ problem.inverse_II
        return mask_OI, (free_OI + dual_OI) * mask_OI, low

    def _solve_jointly(self, problem: _Problem, mask_OI: Tensor, kept_OI: Tensor) -> tuple[Tensor, Tensor]:
        """The mask and the weights of unit features to go with a correction, from those to go without."""
        start_OI, moment_II = problem.start_OI, _of_alive(problem.hessian_II, problem.alive_I)
        out_OR, pool_RI = low_rank(start_OI - kept_OI, moment_II, self.rank)
        low = _LowRank(moment_II, out_OR.float(), pool_RI.float())
        least = low.left_over(start_OI - kept_OI)
        for _ in range(self.rounds):
            found_mask_OI, found_OI, found = self._iterate(problem, low)
            assert found is not None
            found = found.nearer(start_OI - found_OI)
            left = found.left_over(start_OI - found_OI)
            if not left < least:
                break
            mask_OI, kept_OI, low, least = found_mask_OI, found_OI, found, left
        return mask_OI, solve_on_mask(start_OI - low.dense_OI, kept_OI, mask_OI, moment_II, _POLISH_STEPS)


@dataclass(frozen=True)
class _Problem:
    """What is solved for a layer, in unit features: weights near `start_OI` by the damped Hessian, and a mask if
    `prior_OI` is None. `inverse_II` is that of H + rho I."""

    start_OI: Tensor
    hessian_II: Tensor
    inverse_II: Tensor
    alive_I: Tensor
    pattern: NMPattern
    prior_OI: Tensor | None


@dataclass(frozen=True)
class _LowRank:
    """A correction B A of unit features, and the moment `[I, I]` that says what it leaves of an error."""

    moment_II: Tensor
    out_OR: Tensor
    pool_RI: Tensor

    @cached_property
    def dense_OI(self) -> Tensor:
        """B A."""
        return self.out_OR @ self.pool_RI

    def nearer(self, error_OI: Tensor) -> _LowRank:
        """One that leaves no more of this error."""
        return _LowRank(self.moment_II, *nearer_low_rank(error_OI, self.moment_II, self.out_OR))

    def left_over(self, error_OI: Tensor) -> float:
        """How much of an error stays: sum of squared outputs, over the calibration tokens."""
        left_OI = error_OI - self.dense_OI
        return float(((left_OI @ self.moment_II) * left_OI).sum(dtype=torch.float64))


def _of_alive(hessian_II: Tensor, alive_I: Tensor) -> Tensor:
    """Without what damping added to features that were never active: no rank is to be spent on these."""
    moment_II = hessian_II.clone()
    moment_II.diagonal().mul_(alive_I)
    return moment_II


def _ramped_mask(score_OI: Tensor, pattern: NMPattern, progress: float) -> Tensor:
    """The pattern's mask of these scores, plus the best of each row's rest, of which `progress` (0 to 1) is dropped."""
    mask_OI = pattern.mask_from_scores(score_OI)
    in_features = score_OI.shape[1]
    dropped = round(progress * (in_features - pattern.kept_columns(in_features)))
    if dropped == 0:
        return torch.ones_like(mask_OI)
    return mask_OI | (score_OI > _kth_smallest(score_OI.masked_fill(mask_OI, math.inf), dropped))


def _kth_smallest(value_OI: Tensor, k: int) -> Tensor:
    """The k-th smallest value of each row, `[O, 1]`. On a CPU it is numpy that finds it: in a sixth of torch's time."""
    if value_OI.device.type != "cpu":
        return value_OI.kthvalue(k, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(value_OI.numpy(), k - 1, axis=1)[:, k - 1 : k])


METHOD = ADMM
