"""Orthogonal iteration towards the closed form, which `tests/maskgen/methods/correction/test_eora.py` checks.

Legend: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.errors import NumericalError
from maskgen.numerics.low_rank import low_rank, nearer_low_rank

SHAPES = [(24, 40), (40, 24), (32, 32)]


def problem(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """An error `[O, I]` and a second moment `[I, I]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs_TI = torch.randn(60, shape[1], generator=generator, dtype=torch.float64)
    inputs_TI *= torch.logspace(-1, 1, shape[1], dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64), inputs_TI.T @ inputs_TI


def left_over(error_OI: Tensor, moment_II: Tensor, pair: tuple[Tensor, Tensor]) -> float:
    left_OI = error_OI - pair[0] @ pair[1]
    return float(((left_OI @ moment_II) * left_OI).sum())


# how near so many steps come depends on the problem: the same problems each time
@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.sampled_from(SHAPES), st.integers(1, 20), st.integers(0, 10_000))
def test_a_step_never_leaves_more_and_steps_reach_the_closed_form(shape: tuple[int, int], rank: int, seed: int) -> None:
    error_OI, moment_II = problem(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    out_OR = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)).Q
    left = left_over(error_OI, moment_II, (out_OR, out_OR.T @ error_OI))
    least = left_over(error_OI, moment_II, low_rank(error_OI, moment_II, rank))
    for _ in range(60):
        found = nearer_low_rank(error_OI, moment_II, out_OR)
        out_OR, before, left = found[0], left, left_over(error_OI, moment_II, found)
        assert least * (1 - 1e-9) <= left <= before * (1 + 1e-9)
    assert left <= least * 1.02


def test_what_a_correction_can_hold_is_left_to_nothing() -> None:
    _, moment_II = problem((24, 40), 3)
    generator = torch.Generator().manual_seed(3)
    error_OI = torch.randn(24, 4, generator=generator).double() @ torch.randn(4, 40, generator=generator).double()
    assert left_over(error_OI, moment_II, low_rank(error_OI, moment_II, 4)) < 1e-9 * moment_II.trace()


def test_moments_that_are_not_finite() -> None:
    error_OI, moment_II = problem((24, 40), 3)
    moment_II[3, 3] = torch.nan
    with pytest.raises(NumericalError, match="second moment of 40 input features is not finite"):
        low_rank(error_OI, moment_II, 4)


def test_eigenvectors_that_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(NumericalError, match=r"no eigenvectors .* 6 input features: failed to converge; give more"):
        low_rank(torch.ones(4, 6), torch.eye(6), 2)
