"""SparseGPT: prune column by column, and change the columns that follow so that they make up for the error.

The layer's squared output error on calibration data is ||(W - W') X||^2, a quadratic with Hessian H = (2/T) X^T X per
row. Going left to right, dropping entry w_j costs w_j^2 / d_j^2, where d is the diagonal of U, the upper Cholesky
factor of H^-1 (H^-1 = U^T U); the best repair of the remaining columns is W[:, j:] -= (w_j / d_j) U[j, j:]. All rows
share U, so a sweep is I rank-one updates, done inside blocks of columns with one matrix product per block for the rest.

U comes from one factorisation: with the order of the columns reversed, H = R R^T with R upper triangular, and
U = R^-1. That avoids factorising an explicit inverse, which is where float32 usually fails first.

Features that were never active have H_jj = 0: their weights multiply nothing, so they are set to zero and pruned first.
The diagonal is damped by a fraction of its mean. With `update=False` only the mask is
taken, scored on the original weights, which stay as they are: a prior for learned methods.

Workspace: three float32 matrices `[I, I]` beside two of the weight's size.

Source: Frantar & Alistarh, "SparseGPT", ICML 2023.

Legend: T = tokens, O = out features, I = in features, B = columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import LocalMethod, Solution
from maskgen.numerics.statistics import Gram, add_gram, inverse_factor


@dataclass(frozen=True)
class SparseGPT(LocalMethod):
    """`damp`: this fraction of the Hessian's mean diagonal is added to it; `block`: columns updated together.

    `update`: whether the weights that stay are changed, or only the mask is taken.
    """

    damp: float = 0.01
    block: int = 128
    update: bool = True

    keeps_gram = True

    def __post_init__(self) -> None:
        self.require_positive("damp")
        if self.block < 1:
            raise RecipeError(f"method.block {self.block}: expected a positive number of columns, such as 128")

    def observe(self, stats: Gram | None, x_TI: Tensor) -> Gram:
        """`stats` is the Gram matrix of the inputs, updated in place."""
        return add_gram(stats, x_TI)

    def check_pattern(self, pattern: NMPattern) -> None:
        """`RecipeError` unless blocks consist of whole groups."""
        if self.block % pattern.m:
            raise RecipeError(
                f"method.block {self.block}: not a multiple of {pattern.m}, the group size of pattern {pattern}"
            )

    def solve(self, weight_OI: Tensor, stats: Gram, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """Mask, and with `update` the compensated weights (float32, zero where pruned)."""
        self.check_pattern(pattern)
        hessian_II = stats.sum_II * (2.0 / stats.tokens)
        dead_I = hessian_II.diagonal() == 0
        hessian_II.diagonal()[dead_I] = 1.0
        weight_OI = weight_OI.masked_fill(dead_I, 0.0)
        inverse_factor_II = inverse_factor(hessian_II, self.damp)
        if not self.update:
            score_OI = (weight_OI / inverse_factor_II.diagonal()).square()
            return Solution(pattern.mask_from_scores(score_OI))
        return _sweep(weight_OI, inverse_factor_II, pattern, self.block)


def _sweep(weight_OI: Tensor, factor_II: Tensor, pattern: NMPattern, block: int) -> Solution:
    """Prune from left to right; each group is chosen on weights that already make up for the columns before it."""
    in_features = weight_OI.shape[1]
    weight_OI = weight_OI.clone()
    mask_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        columns = slice(start, stop)
        weight_BO = weight_OI[:, columns].T.contiguous()
        error_BO = torch.empty_like(weight_BO)
        mask_OI[:, columns] = _sweep_block(weight_BO, error_BO, factor_II[columns, columns], pattern)
        weight_OI[:, columns] = weight_BO.T
        weight_OI[:, stop:].addmm_(error_BO.T, factor_II[columns, stop:], alpha=-1)
    return Solution(mask_OI, weight_OI)


def _sweep_block(weight_BO: Tensor, error_BO: Tensor, factor_BB: Tensor, pattern: NMPattern) -> Tensor:
    """Prune one block in place and write its scaled errors to `error_BO`; returns the block's mask `[O, B]`.

    The block is transposed so that a column of the weight is contiguous in memory. Within a group each column's error
    changes the columns after it at once; the rest of the block is changed once per group.
    """
    diagonal_B = factor_BB.diagonal()
    masks = []
    for start in range(0, weight_BO.shape[0], pattern.m):
        stop = start + pattern.m
        group = slice(start, stop)
        mask_Om = pattern.mask_from_scores((weight_BO[group].T / diagonal_B[group]).square())
        masks.append(mask_Om)
        for column, keep_O in enumerate(mask_Om.T, start):
            kept_O = weight_BO[column].where(keep_O, 0.0)
            torch.div(weight_BO[column] - kept_O, diagonal_B[column], out=error_BO[column])
            weight_BO[column] = kept_O
            weight_BO[column + 1 : stop].addr_(factor_BB[column, column + 1 : stop], error_BO[column], alpha=-1)
        weight_BO[stop:].addmm_(factor_BB[group, stop:].T, error_BO[group], alpha=-1)
    return torch.cat(masks, dim=1)


METHOD = SparseGPT
