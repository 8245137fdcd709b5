"""SparseSwaps against exhaustive search, and its invariants: errors never rise, a second run finds nothing more.

Legend: T = tokens, O = out features, I = in features, m = columns of a group.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import Drift
from maskgen.methods.oneshot.magnitude import Magnitude
from maskgen.methods.oneshot.sparseswaps import SparseSwaps
from maskgen.methods.oneshot.wanda import Wanda
from maskgen.numerics.statistics import Gram, add_gram
from tests.maskgen.methods.oneshot.test_admm import PATTERN, layer, random_mask


def errors_O(weight_OI: Tensor, mask_OI: Tensor, x_TI: Tensor) -> Tensor:
    """The squared output error of each row, in float64."""
    return ((weight_OI * ~mask_OI).double() @ x_TI.double().T).square().sum(1)


def improved(weight_OI: Tensor, x_TI: Tensor, mask_OI: Tensor, passes: int = 50) -> Tensor:
    return SparseSwaps(mask="prior", passes=passes).solve(weight_OI, add_gram(None, x_TI), PATTERN, mask_OI).mask


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(8, 200), passes=st.integers(1, 4))
def test_no_row_ever_gets_worse(seed: int, tokens: int, passes: int) -> None:
    weight_OI, x_TI = layer(tokens=tokens, in_features=160, seed=seed)  # 40 groups: more than a block of them
    before_OI = random_mask(weight_OI, PATTERN, seed)
    after_OI = improved(weight_OI, x_TI, before_OI, passes)
    PATTERN.check_mask(after_OI)
    before_O = errors_O(weight_OI, before_OI, x_TI)
    assert (errors_O(weight_OI, after_OI, x_TI) <= before_O * (1 + 1e-4)).all()


def test_where_it_ends_no_single_group_can_do_better() -> None:
    """In float64, over every pattern of every group."""
    weight_OI, x_TI = layer(out_features=4, in_features=24, tokens=300)
    mask_OI = improved(weight_OI, x_TI, random_mask(weight_OI, PATTERN))
    found_O = errors_O(weight_OI, mask_OI, x_TI)
    for first, kept_m in product(range(0, 24, 4), PATTERN.candidates()):
        other_OI = mask_OI.clone()
        other_OI[:, first : first + 4] = kept_m
        assert (errors_O(weight_OI, other_OI, x_TI) >= found_O * (1 - 1e-5)).all()


def test_two_groups_reach_the_best_of_all_masks_from_a_neighbour() -> None:
    weight_OI, x_TI = layer(out_features=16, in_features=8, tokens=300)
    masks = [torch.cat(pair).expand(16, 8) for pair in product(PATTERN.candidates(), repeat=2)]
    best_O = torch.stack([errors_O(weight_OI, mask_OI, x_TI) for mask_OI in masks]).amin(0)
    starts = [improved(weight_OI, x_TI, mask_OI) for mask_OI in masks]
    reached_O = torch.stack([errors_O(weight_OI, mask_OI, x_TI) for mask_OI in starts]).amin(0)
    torch.testing.assert_close(reached_O, best_O)


def test_it_beats_wandas_mask_which_it_starts_from() -> None:
    weight_OI, x_TI = layer(out_features=24, in_features=64, tokens=600)
    stats = add_gram(None, x_TI)
    wanda_OI = Wanda().solve(weight_OI, stats.sum_II.diagonal(), PATTERN).mask
    own = SparseSwaps().solve(weight_OI, stats, PATTERN)
    assert own.weight is None
    assert torch.equal(own.mask, improved(weight_OI, x_TI, wanda_OI, passes=SparseSwaps().passes))
    assert errors_O(weight_OI, own.mask, x_TI).sum() < 0.9 * errors_O(weight_OI, wanda_OI, x_TI).sum()


def test_inputs_that_are_not_correlated_give_magnitude() -> None:
    weight_OI, _ = layer()
    mask_OI = SparseSwaps().solve(weight_OI, Gram(torch.eye(32) * 3.0, 7), PATTERN).mask
    assert torch.equal(mask_OI, Magnitude().solve(weight_OI, None, PATTERN).mask)


def test_dead_features_change_nothing_for_others() -> None:
    weight_OI, x_TI = layer()
    x_TI[:, 4:8] = 0
    start_OI = random_mask(weight_OI, PATTERN)
    mask_OI = improved(weight_OI, x_TI, start_OI)
    assert torch.equal(mask_OI[:, 4:8], start_OI[:, 4:8])
    other_OI = weight_OI.clone()
    other_OI[:, 4:8] = 1e3
    assert torch.equal(improved(other_OI, x_TI, start_OI), mask_OI)


def test_it_aims_at_what_the_dense_model_puts_out() -> None:
    """Inputs that lack a part of their dense values: the masks chosen for these come nearer to the dense outputs."""
    weight_OI, dense_TI = layer(out_features=24, in_features=64, tokens=600)
    x_TI = dense_TI.roll(1, 1) * 0.4 + dense_TI * 0.6
    method = SparseSwaps(asymmetric=True, ridge=0.01)
    stats = method.observe_drift(method.observe(None, x_TI), x_TI, Drift(dense_TI - x_TI))
    aimed = method.solve(weight_OI, stats, PATTERN).mask
    blind = SparseSwaps().solve(weight_OI, add_gram(None, x_TI), PATTERN).mask

    def missed(mask_OI: Tensor) -> float:
        return float((dense_TI @ weight_OI.T - x_TI @ (weight_OI * mask_OI).T).square().sum())

    assert missed(aimed) < missed(blind)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="passes 0"):
        SparseSwaps(passes=0)
    with pytest.raises(RecipeError, match="mask 'wanda'"):
        SparseSwaps(mask="wanda")
    with pytest.raises(RecipeError, match="sparseswaps"):
        SparseSwaps().check_pattern(NMPattern(16, 32))
