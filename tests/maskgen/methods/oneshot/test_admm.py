"""ADMM against the least-squares problem it solves, row by row in float64, and the masks it chooses.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import Drift
from maskgen.methods.oneshot.admm import ADMM
from maskgen.methods.oneshot.magnitude import Magnitude
from maskgen.methods.oneshot.wanda import Wanda
from maskgen.numerics.statistics import Gram, add_gram

PATTERN = NMPattern(2, 4)


def layer(out_features: int = 10, in_features: int = 32, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(out_features, in_features, generator=generator)
    mix_II = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    scale_I = torch.logspace(-1, 1, in_features)[torch.randperm(in_features, generator=generator)]
    return weight_OI, (torch.randn(tokens, in_features, generator=generator) @ mix_II + 0.2) * scale_I


def random_mask(weight_OI: Tensor, pattern: NMPattern, seed: int = 5) -> Tensor:
    return pattern.mask_from_scores(torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(seed)))


def repair(weight_OI: Tensor, x_TI: Tensor, mask_OI: Tensor, pattern: NMPattern = PATTERN, **options: Any) -> Tensor:
    method = ADMM(mask="prior", **options)
    solution = method.solve(weight_OI, add_gram(None, x_TI), pattern, mask_OI)
    assert torch.equal(solution.mask, mask_OI) and solution.weight is not None
    assert (solution.weight[~mask_OI] == 0).all()
    return solution.weight


def normal_equations(weight_OI: Tensor, x_TI: Tensor, mask_OI: Tensor, damp: float) -> Tensor:
    """The minimiser of (w - w0)^T H (w - w0) on each row's support, H damped in units of the features' norms."""
    gram_II = x_TI.double().T @ x_TI.double()
    gram_II += damp * torch.diag(gram_II.diagonal())
    solved_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row, keep in enumerate(mask_OI):
        right = gram_II[keep] @ weight_OI[row].double()
        solved_OI[row, keep] = torch.linalg.solve(gram_II[keep][:, keep], right)
    return solved_OI


def error(weight_OI: Tensor, solved_OI: Tensor, x_TI: Tensor) -> float:
    return float(((weight_OI - solved_OI).double() @ x_TI.double().T).square().sum())


@pytest.mark.parametrize("damp", [0.1, 0.02])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_a_given_mask_gets_the_least_squares_optimum(n: int, m: int, damp: float) -> None:
    weight_OI, x_TI = layer()
    pattern = NMPattern(n, m)
    mask_OI = random_mask(weight_OI, pattern)
    exact_OI = normal_equations(weight_OI, x_TI, mask_OI, damp)
    converged_OI = repair(weight_OI, x_TI, mask_OI, pattern, damp=damp, iterations=800)
    torch.testing.assert_close(converged_OI.double(), exact_OI, atol=2e-3, rtol=2e-3)
    best, masked = error(weight_OI, exact_OI, x_TI), error(weight_OI, weight_OI * mask_OI, x_TI)
    default = error(weight_OI, repair(weight_OI, x_TI, mask_OI, pattern, damp=damp), x_TI)
    assert best < 0.8 * masked
    assert default - best < 0.05 * (masked - best), "20 iterations must close 95 % of what can be closed"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(8, 200), rho=st.sampled_from([0.5, 1.0, 2.0]))
def test_never_worse_than_the_mask_alone(seed: int, tokens: int, rho: float) -> None:
    weight_OI, x_TI = layer(tokens=tokens, seed=seed)
    mask_OI = random_mask(weight_OI, PATTERN, seed)
    masked = error(weight_OI, weight_OI * mask_OI, x_TI)
    assert error(weight_OI, repair(weight_OI, x_TI, mask_OI, rho=rho), x_TI) <= masked * (1 + 1e-5)


def test_nothing_to_repair_stays_as_it_is() -> None:
    weight_OI, x_TI = layer()
    mask_OI = random_mask(weight_OI, PATTERN)
    legal_OI = weight_OI * mask_OI
    scaled_and_back = {"atol": 0.0, "rtol": 2 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(repair(legal_OI, x_TI, mask_OI), legal_OI, **scaled_and_back)
    torch.testing.assert_close(repair(legal_OI, x_TI, mask_OI, iterations=500), legal_OI, **scaled_and_back)


def test_inputs_that_are_not_correlated_let_no_weight_stand_in_for_another() -> None:
    weight_OI, _ = layer()
    mask_OI = random_mask(weight_OI, PATTERN)
    uncorrelated = Gram(torch.diag(torch.logspace(-2, 2, 32)), 7)
    solution = ADMM(mask="prior", iterations=200).solve(weight_OI, uncorrelated, PATTERN, mask_OI)
    torch.testing.assert_close(solution.weight, weight_OI * mask_OI, atol=1e-5, rtol=1e-5)


def test_scaling_rows_weights_and_features() -> None:
    """Rows and units of the inputs are free: scale W by s and X by 1/s, per column, and the layer computes the same."""
    weight_OI, x_TI = layer()
    mask_OI = random_mask(weight_OI, PATTERN)
    repaired_OI = repair(weight_OI, x_TI, mask_OI)
    rows_O1, columns_I = 2.0 ** torch.arange(-5, 5).float()[:, None], 2.0 ** (torch.arange(32) % 7 - 3).float()
    assert torch.equal(repair(weight_OI * rows_O1, x_TI, mask_OI), repaired_OI * rows_O1)
    assert torch.equal(repair(weight_OI * columns_I, x_TI / columns_I, mask_OI), repaired_OI * columns_I)
    own = ADMM().solve(weight_OI, add_gram(None, x_TI), PATTERN)
    scaled = ADMM().solve(weight_OI * columns_I * rows_O1, add_gram(None, x_TI / columns_I), PATTERN)
    assert own.weight is not None and scaled.weight is not None
    assert torch.equal(own.mask, scaled.mask)
    assert torch.equal(own.weight * columns_I * rows_O1, scaled.weight)


def test_its_own_mask_beats_repairing_wandas() -> None:
    weight_OI, x_TI = layer(out_features=24, in_features=64, tokens=600)
    stats = add_gram(None, x_TI)
    own = ADMM().solve(weight_OI, stats, PATTERN)
    wanda = Wanda().solve(weight_OI, stats.sum_II.diagonal(), PATTERN).mask
    assert own.weight is not None and not torch.equal(own.mask, wanda)
    assert error(weight_OI, own.weight, x_TI) < error(weight_OI, repair(weight_OI, x_TI, wanda), x_TI)


def test_one_iteration_of_choice_is_wandas_mask() -> None:
    weight_OI, x_TI = layer()
    stats = add_gram(None, x_TI)
    mask_OI = ADMM(ramp=1).solve(weight_OI, stats, PATTERN).mask
    assert torch.equal(mask_OI, Wanda().solve(weight_OI, stats.sum_II.diagonal(), PATTERN).mask)


def test_uncorrelated_inputs_give_magnitude() -> None:
    """Exactly when rho exceeds the damped diagonal (1.1). Below it a dropped weight weighs 1.1 / rho in |W~ + U|."""
    weight_OI, _ = layer(out_features=200)
    stats = Gram(torch.eye(32) * 3.0, 7)
    magnitude = Magnitude().solve(weight_OI, None, PATTERN).mask
    solution = ADMM(rho=1.2).solve(weight_OI, stats, PATTERN)
    assert torch.equal(solution.mask, magnitude)
    torch.testing.assert_close(solution.weight, weight_OI * magnitude)
    assert float((ADMM().solve(weight_OI, stats, PATTERN).mask == magnitude).float().mean()) > 0.95


def test_dead_features_are_dropped_first_and_kept_as_they_are_where_a_prior_keeps_them() -> None:
    weight_OI, x_TI = layer()
    weight_OI[:, 6] = 1000.0
    x_TI[:, 6] = 0
    own = ADMM().solve(weight_OI, add_gram(None, x_TI), PATTERN)
    assert own.weight is not None and not own.mask[:, 6].any() and own.weight.abs().max() < 100
    mask_OI = random_mask(weight_OI, PATTERN)
    assert mask_OI[:, 6].any()
    repaired_OI = repair(weight_OI, x_TI, mask_OI)
    torch.testing.assert_close(repaired_OI[mask_OI[:, 6], 6], weight_OI[mask_OI[:, 6], 6])
    without_OI = repair(weight_OI * (torch.arange(32) != 6), x_TI, mask_OI)
    rest = torch.arange(32) != 6
    torch.testing.assert_close(repaired_OI[:, rest], without_OI[:, rest], atol=1e-3, rtol=1e-3)


def test_an_impossible_hessian_is_a_numerical_error() -> None:
    weight_OI, _ = layer()
    for gram_II in (
        torch.eye(32) - torch.ones(32, 32),
        torch.full((32, 32), torch.nan),
        torch.full((32, 32), torch.inf),
    ):
        with pytest.raises(NumericalError, match=r"method\.damp"):
            ADMM().solve(weight_OI, Gram(gram_II, 1), PATTERN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "given"}, r"method\.mask 'given': expected one of \['own', 'prior'\]"),
        ({"damp": 0.0}, r"method\.damp 0\.0"),
        ({"rho": -1.0}, r"method\.rho -1\.0"),
        ({"rho": float("nan")}, r"method\.rho nan"),
        ({"ramp": 0}, r"method\.ramp 0"),
        ({"ramp": 21}, r"method\.ramp 21: .* \(20\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ADMM(**options)


# how near so many steps come depends on the problem: the same problems each time
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, 0.3, 1.0]), writes=st.booleans())
def test_asymmetric_weights_put_out_what_the_dense_model_does(seed: int, shift: float, writes: bool) -> None:
    """Against least squares of the dense outputs on each row's support, in float64, with a ridge that is next to
    none."""
    weight_OI, dense_TI = layer(seed=seed)
    noise_TI = torch.randn(dense_TI.shape, generator=torch.Generator().manual_seed(seed))
    x_TI = dense_TI + shift * noise_TI * dense_TI.square().mean(0).sqrt()
    mask_OI = random_mask(weight_OI, PATTERN, seed)
    method = ADMM(mask="prior", asymmetric=True, ridge=1e-6, damp=1e-6, iterations=3000)
    wanted_TO = dense_TI @ weight_OI.T
    stream_TO = 0.1 * wanted_TO.flip(1) if writes else torch.zeros_like(wanted_TO)
    drift = Drift(dense_TI - x_TI, stream_TO if writes else None)
    solved_OI = method.solve(
        weight_OI, method.observe_drift(method.observe(None, x_TI), x_TI, drift), PATTERN, mask_OI
    ).weight
    assert solved_OI is not None
    wanted_TO = (wanted_TO + stream_TO).double()

    def distance(found_OI: Tensor) -> float:
        return float((x_TI.double() @ found_OI.double().T - wanted_TO).square().sum())

    best_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row, keep in enumerate(mask_OI):
        best_OI[row, keep] = torch.linalg.lstsq(x_TI[:, keep].double(), wanted_TO[:, row, None]).solution[:, 0]
    assert distance(solved_OI) <= 1.02 * distance(best_OI)


def test_without_drift_asymmetric_changes_nothing() -> None:
    weight_OI, x_TI = layer()
    method = ADMM(asymmetric=True)
    stats = method.observe_drift(
        method.observe(None, x_TI), x_TI, Drift(x_TI - x_TI, torch.zeros(len(x_TI), len(weight_OI)))
    )
    one, other = method.solve(weight_OI, stats, PATTERN), ADMM().solve(weight_OI, add_gram(None, x_TI), PATTERN)
    assert one.weight is not None and other.weight is not None
    assert torch.equal(one.mask, other.mask) and torch.equal(one.weight, other.weight)


def test_features_that_are_dead_by_now_stay_finite() -> None:
    weight_OI, dense_TI = layer()
    x_TI = dense_TI.clone()
    x_TI[:, 3] = 0
    method = ADMM(asymmetric=True)
    stats = method.observe_drift(method.observe(None, x_TI), x_TI, Drift(dense_TI - x_TI))
    solution = method.solve(weight_OI, stats, PATTERN)
    assert solution.weight is not None and torch.isfinite(solution.weight).all()
