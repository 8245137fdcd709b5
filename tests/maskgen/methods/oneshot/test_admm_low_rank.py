"""ADMM with a low-rank correction: what is left beside what the two leave in turn, round by round, in float64.

Legend: T = tokens, O = out features, I = in features, R = rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import NumericalError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import Drift, Solution
from maskgen.methods.oneshot import admm
from maskgen.methods.oneshot.admm import ADMM
from maskgen.numerics.low_rank import low_rank
from maskgen.numerics.statistics import Gram, add_gram, aimed_at_dense

PATTERN = NMPattern(2, 4)
SHAPES = [(24, 40), (40, 24), (32, 32)]


def layer(shape: tuple[int, int], seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight `[O, I]` and correlated inputs `[T, I]` of different scales."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(shape[1], shape[1], generator=generator) / shape[1] ** 0.5
    scale_I = torch.logspace(-1, 1, shape[1])[torch.randperm(shape[1], generator=generator)]
    x_TI = (torch.randn(tokens, shape[1], generator=generator) @ mix_II + 0.2) * scale_I
    return torch.randn(shape, generator=generator), x_TI


def drifted(method: ADMM, x_TI: Tensor, out_features: int, seed: int) -> Gram:
    """Statistics of inputs that have moved from those of the dense model, of a layer that adds to the stream."""
    generator = torch.Generator().manual_seed(seed)
    drift_TI = 0.3 * torch.randn(x_TI.shape, generator=generator) * x_TI.square().mean(0).sqrt()
    stream_TO = torch.randn(len(x_TI), out_features, generator=generator)
    return method.observe_drift(method.observe(None, x_TI), x_TI, Drift(drift_TI, stream_TO))


def damped(stats: Gram, damp: float) -> Tensor:
    """H + damp * diag(H), float64."""
    gram_II = stats.sum_II.double()
    return gram_II + damp * torch.diag(gram_II.diagonal())


def left_over(method: ADMM, weight_OI: Tensor, served_OI: Tensor, stats: Gram) -> float:
    """What both minimise: tr(E H E^T), with E what is served less than what is aimed at."""
    error_OI = (aimed_at_dense(weight_OI, stats, method.ridge) - served_OI).double()
    return float(((error_OI @ damped(stats, method.damp)) * error_OI).sum())


def in_turn(method: ADMM, weight_OI: Tensor, stats: Gram, prior_OI: Tensor | None = None) -> float:
    """What ADMM alone, and then the best correction of what it leaves, leave over."""
    solution = replace(method, rank=0).solve(weight_OI, stats, PATTERN, prior_OI)
    assert solution.weight is not None
    error_OI = aimed_at_dense(weight_OI, stats, method.ridge) - solution.weight
    scale_I = stats.sum_II.diagonal().double().sqrt()
    moment_II = damped(stats, method.damp) / scale_I / scale_I[:, None]
    out_OR, pool_RI = low_rank(error_OI * scale_I, moment_II, method.rank)
    return left_over(method, weight_OI, solution.weight + out_OR @ pool_RI / scale_I, stats)


def served(method: ADMM, weight_OI: Tensor, solution: Solution, stats: Gram) -> Tensor:
    """Z + B A."""
    assert solution.weight is not None
    correction = method.correct(weight_OI, solution.weight, stats)
    assert correction.pool is not None and correction.out.dtype == correction.pool.dtype == torch.float32
    assert correction.out.shape == (weight_OI.shape[0], method.rank)
    assert correction.pool.shape == (method.rank, weight_OI.shape[1])
    return solution.weight + correction.dense(weight_OI.shape[1])


# how near so many steps come depends on the problem: the same problems each time
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.sampled_from(SHAPES), st.integers(1, 12), st.integers(0, 10_000), st.integers(30, 300), st.booleans(),
    st.sampled_from(["own", "prior"]),
)  # fmt: skip
def test_rounds_leave_less_each_and_no_more_than_the_two_in_turn(
    shape: tuple[int, int], rank: int, seed: int, tokens: int, asymmetric: bool, mask: str
) -> None:
    weight_OI, x_TI = layer(shape, seed, tokens)
    method = ADMM(rank=rank, asymmetric=asymmetric, mask=mask)
    stats = drifted(method, x_TI, shape[0], seed) if asymmetric else add_gram(None, x_TI)
    prior_OI = PATTERN.mask_from_scores(weight_OI.abs()) if mask == "prior" else None
    seen: list[float] = []
    measured = admm._LowRank.left_over

    def measure(*args: Any) -> float:
        seen.append(measured(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admm._LowRank, "left_over", measure)
        solution = method.solve(weight_OI, stats, PATTERN, prior_OI)
    assert solution.weight is not None and not solution.weight[~solution.mask].any()
    PATTERN.check_mask(solution.mask, "mask")
    assert prior_OI is None or torch.equal(solution.mask, prior_OI)
    left = left_over(method, weight_OI, served(method, weight_OI, solution, stats), stats)
    assert seen[0] == pytest.approx(in_turn(method, weight_OI, stats, prior_OI), rel=1e-3), "where the rounds start"
    assert sorted(seen[:-1], reverse=True) == seen[:-1], "only the last round may have been given up"
    assert 2 <= len(seen) <= method.rounds + 1 and left <= min(seen) * (1 + 1e-4)


def test_it_leaves_far_less_than_the_two_in_turn() -> None:
    for seed, shape in enumerate(SHAPES):
        weight_OI, x_TI = layer(shape, seed)
        method, stats = ADMM(rank=4), add_gram(None, x_TI)
        solution = method.solve(weight_OI, stats, PATTERN)
        left = left_over(method, weight_OI, served(method, weight_OI, solution, stats), stats)
        assert left < 0.9 * in_turn(method, weight_OI, stats)


def test_it_finds_most_of_a_weight_that_is_sparse_plus_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = layer((48, 64), tokens=2000)
    sparse_OI = weight_OI * PATTERN.mask_from_scores(torch.rand(48, 64, generator=generator))
    low_OI = torch.randn(48, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    weight_OI, stats = sparse_OI + low_OI, add_gram(None, x_TI)
    method = ADMM(rank=2, rounds=40)
    solution = method.solve(weight_OI, stats, PATTERN)
    left = left_over(method, weight_OI, served(method, weight_OI, solution, stats), stats)
    assert left < 0.3 * in_turn(method, weight_OI, stats)


def test_the_full_rank_leaves_nothing() -> None:
    weight_OI, x_TI = layer((24, 40))
    method, stats = ADMM(rank=24), add_gram(None, x_TI)
    solution = method.solve(weight_OI, stats, PATTERN)
    torch.testing.assert_close(served(method, weight_OI, solution, stats), weight_OI, rtol=1e-3, atol=1e-3)


def test_the_correction_is_the_best_beside_what_is_stored() -> None:
    """It makes up for rounding, too: no other of its rank leaves less beside the rounded weights."""
    weight_OI, x_TI = layer((24, 40))
    method, stats = ADMM(rank=5), add_gram(None, x_TI)
    solution = method.solve(weight_OI, stats, PATTERN)
    assert solution.weight is not None
    rounded_OI = (solution.weight * 4).round() / 4
    kept, fitted = (method.correct(weight_OI, one_OI, stats).dense(40) for one_OI in (solution.weight, rounded_OI))
    left = [left_over(method, weight_OI, rounded_OI + change_OI, stats) for change_OI in (fitted, kept)]
    assert left[0] < left[1]


def test_features_that_were_never_active_take_no_rank() -> None:
    weight_OI, x_TI = layer((24, 40))
    weight_OI[:, 6] = 1000.0
    x_TI[:, 6] = 0
    method, stats, rest = ADMM(rank=3), add_gram(None, x_TI), torch.arange(40) != 6
    solution = method.solve(weight_OI, stats, PATTERN)
    found_OI = served(method, weight_OI, solution, stats)
    assert not solution.mask[:, 6].any() and torch.isfinite(found_OI).all()
    weight_OI[:, 6] = 0
    without = method.solve(weight_OI, stats, PATTERN)
    torch.testing.assert_close(
        served(method, weight_OI, without, stats)[:, rest], found_OI[:, rest], rtol=1e-3, atol=1e-3
    )


def test_without_a_rank_there_is_no_correction() -> None:
    assert ADMM().correction is None and ADMM(rank=3).correction == LowRankCorrection(3)


def test_statistics_that_cannot_be_used() -> None:
    weight_OI, _ = layer((24, 40))
    with pytest.raises(NumericalError, match=r"method\.damp"):
        ADMM(rank=3).solve(weight_OI, Gram(torch.full((40, 40), torch.nan), 1), PATTERN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, r"method\.rank -1: expected"),
        ({"rank": 3, "rounds": 0}, r"method\.rounds 0: expected a positive"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ADMM(**options)
