"""EoRA against the formula of its paper, the problem it solves, and other matrices of the same rank.

Legend: T = tokens, O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import NumericalError, RecipeError
from maskgen.methods import Drift
from maskgen.methods.correction.eora import EoRA
from maskgen.numerics.statistics import Gram

SHAPES = [(24, 40), (40, 24), (32, 32)]


def layer(out_features: int, in_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An error `[O, I]` and correlated inputs `[T, I]` of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    error_OI = torch.randn(out_features, in_features, generator=generator)
    mix_II = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    scale_I = torch.logspace(-1, 1, in_features)[torch.randperm(in_features, generator=generator)]
    return error_OI, (torch.randn(200, in_features, generator=generator) @ mix_II + 0.1) * scale_I


def correct(error_OI: Tensor, x_TI: Tensor, rank: int) -> Tensor:
    """B A, `[O, I]`."""
    method = EoRA(rank)
    found = method.solve(error_OI, torch.zeros_like(error_OI), method.observe(None, x_TI))
    assert found.pool is not None and found.out.dtype == found.pool.dtype == torch.float32
    assert [list(found.out.shape), list(found.pool.shape)] == list(LowRankCorrection(rank).shapes(*error_OI.shape, ""))
    return found.dense(error_OI.shape[1])


def left_over(error_OI: Tensor, change_OI: Tensor, x_TI: Tensor) -> float:
    """||(E - B A) X||_F."""
    return float(((error_OI - change_OI).double() @ x_TI.double().T).norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_it_is_the_formula_of_the_paper(shape: tuple[int, int], rank: int) -> None:
    error_OI, x_TI = layer(*shape)
    values_I, vectors_II = torch.linalg.eigh(x_TI.double().T @ x_TI.double())
    root_I = values_I.sqrt()
    u, s, vt = torch.linalg.svd(error_OI.double() @ vectors_II * root_I, full_matrices=False)
    expected_OI = (u[:, :rank] * s[:rank]) @ (vt[:rank] / root_I) @ vectors_II.T
    torch.testing.assert_close(correct(error_OI, x_TI, rank), expected_OI.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_white_inputs_make_it_the_truncated_svd(shape: tuple[int, int]) -> None:
    error_OI, _ = layer(*shape)
    found = EoRA(6).solve(error_OI, torch.zeros_like(error_OI), Gram(torch.eye(shape[1]), 1))
    u, s, vt = torch.linalg.svd(error_OI, full_matrices=False)
    torch.testing.assert_close(found.dense(shape[1]), u[:, :6] * s[:6] @ vt[:6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_full_rank_restores_the_weight(shape: tuple[int, int]) -> None:
    error_OI, x_TI = layer(*shape)
    torch.testing.assert_close(correct(error_OI, x_TI, min(shape)), error_OI, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SHAPES), st.integers(1, 20), st.integers(0, 10_000), st.floats(1e-3, 1.0))
def test_nothing_of_the_same_rank_leaves_less(shape: tuple[int, int], rank: int, seed: int, size: float) -> None:
    """Not what is near it, not what the plain SVD gives, and not the best that its B, or its A, disturbed can do."""
    error_OI, x_TI = layer(*shape, seed)
    method, generator = EoRA(rank), torch.Generator().manual_seed(seed)
    found = method.solve(error_OI, torch.zeros_like(error_OI), method.observe(None, x_TI))
    assert found.pool is not None
    least = left_over(error_OI, found.dense(shape[1]), x_TI)
    assert least < left_over(error_OI, torch.zeros(shape), x_TI)
    out_OR = found.out + size * torch.randn(found.out.shape, generator=generator) / shape[0] ** 0.5
    pool_RI = found.pool * (1 + size * torch.randn(found.pool.shape, generator=generator))
    u, s, vt = torch.linalg.svd(error_OI, full_matrices=False)
    best_for_out_OI = out_OR @ torch.linalg.lstsq(out_OR, error_OI).solution
    others = [out_OR @ found.pool, found.out @ pool_RI, best_for_out_OI, (u[:, :rank] * s[:rank]) @ vt[:rank]]
    assert all(least <= left_over(error_OI, other, x_TI) * (1 + 1e-5) for other in others)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_rank_leaves_less(shape: tuple[int, int]) -> None:
    error_OI, x_TI = layer(*shape)
    errors = [left_over(error_OI, correct(error_OI, x_TI, rank), x_TI) for rank in range(1, min(shape))]
    assert all(more < less for less, more in itertools.pairwise(errors))


def test_inputs_that_never_occur_do_no_harm() -> None:
    """The second moment has no inverse: fewer tokens than inputs, and a feature that is always 0."""
    error_OI, x_TI = layer(24, 40)
    x_TI[:, 7] = 0
    change_OI = correct(error_OI, x_TI[:10], 10)
    assert torch.isfinite(change_OI).all() and change_OI.norm() <= error_OI.norm() * 1.001
    assert left_over(error_OI, change_OI, x_TI[:10]) < 1e-4 * left_over(error_OI, torch.zeros(24, 40), x_TI[:10])


def test_an_error_of_nothing_needs_nothing() -> None:
    _, x_TI = layer(24, 40)
    assert not correct(torch.zeros(24, 40), x_TI, 4).any()


def test_statistics_that_cannot_be_used() -> None:
    error_OI, x_TI = layer(24, 40)
    x_TI[3, 5] = float("inf")
    with pytest.raises(NumericalError, match="second moment of 40 input features is not finite"):
        correct(error_OI, x_TI, 4)


@pytest.mark.parametrize("rank", [0, -4])
def test_ranks_that_are_none(rank: int) -> None:
    with pytest.raises(RecipeError, match=rf"method\.rank {rank}: expected a positive number"):
        EoRA(rank)


def test_asymmetric_corrections_aim_at_the_dense_outputs() -> None:
    """With the full rank and next to no ridge, what is served puts out W d + e from the inputs x, by least squares."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, served_OI = (torch.randn(12, 16, generator=generator) for _ in range(2))
    x_TI, drift_TI = (torch.randn(300, 16, generator=generator) for _ in range(2))
    stream_TO = torch.randn(300, 12, generator=generator)
    method = EoRA(12, asymmetric=True, ridge=1e-6)
    stats = method.observe_drift(method.observe(None, x_TI), x_TI, Drift(0.3 * drift_TI, stream_TO))
    wanted_TO = (x_TI + 0.3 * drift_TI) @ weight_OI.T + stream_TO
    best_IO = torch.linalg.lstsq(x_TI.double(), wanted_TO.double()).solution
    found_OI = served_OI + method.solve(weight_OI, served_OI, stats).dense(16)
    torch.testing.assert_close(found_OI.T.double(), best_IO, rtol=1e-3, atol=1e-3)
