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

Features that were never active constrain nothing: they are dropped first, and where a given mask keeps them they keep
their weights. Workspace: three float32 matrices `[I, I]` (five with `asymmetric`) beside five of the weight's size.

Sources: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024; for asymmetric
calibration Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", ICML 2025.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import AimedMethod, Solution
from maskgen.numerics.statistics import Gram, aimed_at_dense, shifted_inverse, unit_features


@dataclass(frozen=True)
class ADMM(AimedMethod):
    """`mask`: "own" chooses a mask during the first `ramp` of `iterations`, "prior" uses the one in `--prior`.

    `damp`: this fraction of the Hessian's mean diagonal is added to it; `rho`: weight of the penalty on entries outside
    of the mask, relative to the Hessian of unit features. `asymmetric`: aim at what the dense model puts out, with
    this `ridge`.
    """

    mask: str = "own"
    asymmetric: bool = False
    ridge: float = 1.0
    damp: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    ramp: int = 15

    def __post_init__(self) -> None:
        self.require_one_of(mask=("own", "prior"))
        self.require_positive("damp", "rho", "ridge")
        if not 1 <= self.ramp <= self.iterations:
            raise RecipeError(
                f"method.ramp {self.ramp}: expected at least 1 and at most method.iterations ({self.iterations})"
            )

    def solve(self, weight_OI: Tensor, stats: Gram, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """The mask and the repaired weights (float32, zero where pruned)."""
        assert (prior_OI is not None) == self.uses_prior
        aimed_OI = aimed_at_dense(weight_OI, stats, self.ridge)
        norm_I, alive_I, hessian_II = unit_features(stats.sum_II)
        hessian_II.diagonal().add_(self.damp * hessian_II.diagonal().mean())
        start_OI = aimed_OI * norm_I
        inverse_II = shifted_inverse(hessian_II, self.rho, "damp or method.rho")
        mask_OI = torch.ones_like(weight_OI, dtype=torch.bool) if prior_OI is None else prior_OI
        free_OI, dual_OI = start_OI, torch.zeros_like(start_OI)
        for iteration in range(self.iterations):
            total_OI = free_OI + dual_OI
            if prior_OI is None and iteration < self.ramp:
                progress = 1 - (1 - (iteration + 1) / self.ramp) ** 3
                mask_OI = _ramped_mask(total_OI.abs() * alive_I, pattern, progress)
            kept_OI = total_OI * mask_OI
            dual_OI = total_OI - kept_OI
            free_OI = start_OI + self.rho * (kept_OI - dual_OI - start_OI) @ inverse_II
        return Solution(mask_OI, (free_OI + dual_OI) / norm_I * mask_OI)


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
