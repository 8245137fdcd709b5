"""SparseSwaps: the mask whose weights, left as they are, reproduce a layer's outputs best.

The squared error of a row on calibration data is e^T H e, where H = X^T X and e = w0 - w * m is what the mask takes
from the row. Scores such as Wanda's judge every weight as if it were pruned alone: they see the diagonal of H only. Yet
errors of weights whose inputs rise and fall together add up or cancel. So a mask from scores is improved group by
group. The other groups held fixed, replacing the pattern of a group g, which changes e by d on the columns of g,
changes the error by exactly

    2 d . (H e)_g  +  d^T H_gg d

and the pattern that lowers it most is taken. Rows are independent, so all are changed together; groups are gone
through one after the other, and then again. The error never rises.

With `asymmetric`, w0 is not the layer's own row but what would put out what the dense model does
(`maskgen.numerics.statistics.aimed_at_dense`), so that masks make up for errors of layers before them.

Deviation: the paper exchanges one kept and one pruned weight at a time, the best pair of the row; here the best of all
patterns of a group is taken at once, in the order of the columns, which needs no search over pairs.

With `mask = "own"` the start is Wanda's mask, with "prior" any other method's. Workspace: two float32 matrices
`[I, I]` beside four of the weight's size.

Source: Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", arXiv 2512.10922.

Legend: T = tokens, O = out features, I = in features, B = columns of a block, m = columns of a group, P = patterns of a
group, Q = pairs of its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from maskgen.core.errors import PatternError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import AimedMethod, Solution
from maskgen.numerics.statistics import Gram, aimed_at_dense, unit_features

_BLOCK_GROUPS = 32
"""Groups whose changes are applied to the columns after them together, in one matrix product."""


@dataclass(frozen=True)
class SparseSwaps(AimedMethod):
    """`mask`: "own" starts from Wanda's mask, "prior" from the one in `--prior`. `passes`: over all groups, at most.

    `asymmetric`: aim at what the dense model puts out, with this `ridge`.
    """

    mask: str = "own"
    passes: int = 6
    asymmetric: bool = False
    ridge: float = 1.0

    def __post_init__(self) -> None:
        self.require_one_of(mask=("own", "prior"))
        self.require_positive("ridge")
        if self.passes < 1:
            raise RecipeError(f"method.passes {self.passes}: expected at least 1")

    def check_pattern(self, pattern: NMPattern) -> None:
        """`RecipeError` for a pattern with too many candidates per group to try them all."""
        try:
            pattern.candidates()
        except PatternError as error:
            raise RecipeError(f"method sparseswaps: {error}") from None

    def solve(self, weight_OI: Tensor, stats: Gram, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """The improved mask; weights stay as they are."""
        assert (prior_OI is not None) == self.uses_prior
        norm_I, _, gram_II = unit_features(stats.sum_II)
        scaled_OI = weight_OI * norm_I
        mask_OI = pattern.mask_from_scores(scaled_OI.abs()) if prior_OI is None else prior_OI.clone()
        slope_OI = (aimed_at_dense(weight_OI, stats, self.ridge) * norm_I - scaled_OI * mask_OI) @ gram_II
        candidates_Pm = pattern.candidates().to(weight_OI.device, torch.float32)
        for _ in range(self.passes):
            if not _improve(mask_OI, slope_OI, scaled_OI, gram_II, candidates_Pm):
                break
        return Solution(mask_OI)


def _improve(mask_OI: Tensor, slope_OI: Tensor, weight_OI: Tensor, gram_II: Tensor, candidates_Pm: Tensor) -> bool:
    """One pass over the groups, which changes the mask and the slope e H in place; returns whether any mask changed."""
    m = candidates_Pm.shape[1]
    changed = False
    for start in range(0, weight_OI.shape[1], _BLOCK_GROUPS * m):
        block = slice(start, start + _BLOCK_GROUPS * m)
        change_OB, slope_OB, gram_BB = torch.zeros_like(weight_OI[:, block]), slope_OI[:, block], gram_II[block, block]
        for first in range(0, change_OB.shape[1], m):
            group = slice(first, first + m)
            weight_Om, kept_Om = weight_OI[:, block][:, group], mask_OI[:, block][:, group]
            chosen_Om = _best(weight_Om, kept_Om, slope_OB[:, group], gram_BB[group, group], candidates_Pm)
            if torch.equal(chosen_Om, kept_Om):
                continue
            change_OB[:, group] = weight_Om * (kept_Om.float() - chosen_Om.float())
            slope_OB.addmm_(change_OB[:, group], gram_BB[group])
            kept_Om.copy_(chosen_Om)
            changed = True
        slope_OI[:, : block.start].addmm_(change_OB, gram_II[block, : block.start])
        slope_OI[:, block.stop :].addmm_(change_OB, gram_II[block, block.stop :])
    return changed


def _best(weight_Om: Tensor, kept_Om: Tensor, slope_Om: Tensor, gram_mm: Tensor, candidates_Pm: Tensor) -> Tensor:
    """The pattern of the group with the lowest error for every row, bool `[O, m]`; the present one if it is as good.

    Up to what all patterns share, the error of a pattern S is w_S^T H_gg w_S - 2 w_S . (slope + H_gg w_kept), where w_S
    is the group's weights under it: a sum of terms of one kept column and terms of two.
    """
    pull_Om = slope_Om + (weight_Om * kept_Om) @ gram_mm
    single_Om = weight_Om * (weight_Om * gram_mm.diagonal() - 2 * pull_Om)
    first_Q, second_Q = map(list, zip(*combinations(range(gram_mm.shape[0]), 2), strict=True))
    double_OQ = 2 * weight_Om[:, first_Q] * weight_Om[:, second_Q] * gram_mm[first_Q, second_Q]
    error_OP = single_Om @ candidates_Pm.T + double_OQ @ (candidates_Pm[:, first_Q] * candidates_Pm[:, second_Q]).T
    present_OP = (candidates_Pm.bool() == kept_Om[:, None]).all(-1)
    lowest_O1, best_O = error_OP.amin(1, keepdim=True), error_OP.argmin(1)
    stays_O1 = error_OP.where(present_OP, torch.inf).amin(1, keepdim=True) <= lowest_O1
    return kept_Om.where(stays_O1, candidates_Pm.bool()[best_O])


METHOD = SparseSwaps
