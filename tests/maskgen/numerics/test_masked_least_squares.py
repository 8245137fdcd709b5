"""Conjugate gradients on a mask against the normal equations of every row.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.pattern import NMPattern
from maskgen.numerics.masked_least_squares import solve_on_mask


def problem(seed: int, tokens: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """A target `[O, I]`, a 2:4 mask and the damped Hessian of unit features, float64."""
    generator = torch.Generator().manual_seed(seed)
    target_OI = torch.randn(12, 32, generator=generator, dtype=torch.float64)
    mask_OI = NMPattern(2, 4).mask_from_scores(torch.rand(12, 32, generator=generator))
    inputs_TI = torch.randn(tokens, 32, generator=generator, dtype=torch.float64) + 0.3
    inputs_TI /= inputs_TI.norm(dim=0)
    return target_OI, mask_OI, inputs_TI.T @ inputs_TI + 0.1 * torch.eye(32, dtype=torch.float64)


def loss(target_OI: Tensor, solved_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Of each row."""
    left_OI = solved_OI - target_OI
    return ((left_OI @ hessian_II) * left_OI).sum(1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(4, 100))
def test_every_step_leaves_less_for_every_row(seed: int, tokens: int) -> None:
    target_OI, mask_OI, hessian_II = problem(seed, tokens)
    before_O = loss(target_OI, target_OI * mask_OI, hessian_II)
    for steps in range(1, 24):
        solved_OI = solve_on_mask(target_OI, target_OI * mask_OI, mask_OI, hessian_II, steps)
        assert not solved_OI[~mask_OI].any()
        now_O = loss(target_OI, solved_OI, hessian_II)
        assert (now_O <= before_O * (1 + 1e-9)).all()
        before_O = now_O


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_ends_at_the_normal_equations(dtype: torch.dtype) -> None:
    target_OI, mask_OI, hessian_II = problem(0)
    solved_OI = solve_on_mask(
        target_OI.to(dtype), torch.zeros_like(target_OI, dtype=dtype), mask_OI, hessian_II.to(dtype), 60
    )
    for row, keep in enumerate(mask_OI):
        exact = torch.linalg.solve(hessian_II[keep][:, keep], hessian_II[keep] @ target_OI[row])
        torch.testing.assert_close(solved_OI[row, keep].double(), exact, rtol=1e-3, atol=1e-3)


def test_rows_with_nothing_to_gain_stay_as_they_are() -> None:
    target_OI, mask_OI, hessian_II = problem(0)
    hessian_II[:, 5] = hessian_II[5] = 0  # a feature that is never active
    legal_OI = target_OI * mask_OI
    assert torch.equal(solve_on_mask(legal_OI, legal_OI, mask_OI, hessian_II, 20), legal_OI)
    target_OI[3] = 0
    solved_OI = solve_on_mask(target_OI, target_OI * mask_OI, mask_OI, hessian_II, 20)
    assert torch.isfinite(solved_OI).all() and not solved_OI[3].any()
    assert torch.equal(solved_OI[:, 5], target_OI[:, 5] * mask_OI[:, 5])
