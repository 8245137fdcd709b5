"""Codes for the outputs of a layer: better than the nearest, legal, and right where the answer is known.

Legend: O = out features, I = in features, T = tokens.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from maskgen.core import int4
from maskgen.core.pattern import NMPattern
from maskgen.numerics import grid

TWO_FOUR = NMPattern(2, 4)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, mask, steps and Gram matrix of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(4 * columns, columns, generator=generator)
    x_TI = x_TI @ (torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5)
    weight_OI = torch.randn(rows, columns, generator=generator)
    mask_OI = TWO_FOUR.mask_from_scores(weight_OI.abs())
    weight_OI = weight_OI * mask_OI
    step_OI = (weight_OI.abs().amax(1, keepdim=True) / 7).expand_as(weight_OI).contiguous()
    return weight_OI, mask_OI, step_OI, x_TI.T @ x_TI


def error(codes_OI: Tensor, weight_OI: Tensor, step_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Of each row."""
    difference_OI = codes_OI * step_OI - weight_OI
    return ((difference_OI @ gram_II) * difference_OI).sum(1)


@pytest.mark.parametrize("columns", [8, 120, 264])
def test_outputs_change_less_than_by_the_nearest_codes(columns: int) -> None:
    weight_OI, mask_OI, step_OI, gram_II = problem(24, columns)
    before = [part.clone() for part in (weight_OI, mask_OI, step_OI, gram_II)]
    codes_OI = grid.round_to_grid(weight_OI, mask_OI, step_OI, gram_II, int4.nearest)
    nearest_OI = int4.nearest(weight_OI, step_OI) * mask_OI
    assert torch.equal(codes_OI, codes_OI.round()) and (codes_OI[~mask_OI] == 0).all()
    assert codes_OI.amin() >= int4.LOWEST and codes_OI.amax() <= int4.HIGHEST
    ours, theirs = (error(codes, weight_OI, step_OI, gram_II).sum() for codes in (codes_OI, nearest_OI))
    assert ours < (0.9 if columns > 8 else 1.0) * theirs
    assert all(torch.equal(*pair) for pair in zip(before, (weight_OI, mask_OI, step_OI, gram_II), strict=True))


def test_more_passes_are_never_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, mask_OI, step_OI, gram_II = problem(16, 136)
    damped_II = gram_II + grid.DAMP * gram_II.diagonal().mean() * torch.eye(136)
    errors = []
    for passes in range(5):
        monkeypatch.setattr(grid, "PASSES", passes)
        codes_OI = grid.round_to_grid(weight_OI, mask_OI, step_OI, gram_II, int4.nearest)
        errors.append(error(codes_OI, weight_OI, step_OI, damped_II))
    for first, second in itertools.pairwise(errors):
        assert (second <= first * (1 + 1e-4)).all()
    assert errors[-1].sum() < errors[0].sum()


def test_inputs_that_do_not_go_together_want_the_nearest_codes() -> None:
    weight_OI, mask_OI, step_OI, _ = problem(8, 40)
    gram_II = torch.diag(torch.rand(40) + 0.5)
    codes_OI = grid.round_to_grid(weight_OI, mask_OI, step_OI, gram_II, int4.nearest)
    assert torch.equal(codes_OI, int4.nearest(weight_OI, step_OI) * mask_OI)


def test_no_single_code_can_be_changed_for_the_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PASSES", 50)
    weight_OI, mask_OI, step_OI, gram_II = problem(6, 16)
    codes_OI = grid.round_to_grid(weight_OI, mask_OI, step_OI, gram_II, int4.nearest)
    damped_II = gram_II + grid.DAMP * gram_II.diagonal().mean() * torch.eye(16)
    best_O = error(codes_OI, weight_OI, step_OI, damped_II)
    for column in range(16):
        for change in (-1, 1):
            other_OI = codes_OI.clone()
            other_OI[:, column] += change * mask_OI[:, column]
            legal_O = (other_OI.amin(1) >= int4.LOWEST) & (other_OI.amax(1) <= int4.HIGHEST)
            assert (error(other_OI, weight_OI, step_OI, damped_II) >= best_O * (1 - 1e-4))[legal_O].all()


def test_features_that_were_never_active_keep_their_nearest_codes() -> None:
    weight_OI, mask_OI, step_OI, gram_II = problem(8, 24)
    gram_II[5], gram_II[:, 5] = 0, 0
    codes_OI = grid.round_to_grid(weight_OI, mask_OI, step_OI, gram_II, int4.nearest)
    assert torch.equal(codes_OI[:, 5], (int4.nearest(weight_OI, step_OI) * mask_OI)[:, 5])
