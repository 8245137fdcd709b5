"""SparseGPT against its equations in plain float64 loops, and its invariants on layers where the answer is known.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.oneshot.magnitude import Magnitude
from maskgen.methods.oneshot.sparsegpt import SparseGPT
from maskgen.numerics.statistics import Gram

PATTERN = NMPattern(2, 4)


def layer(out_features: int = 10, in_features: int = 32, tokens: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(out_features, in_features, generator=generator)
    mix_II = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    return weight_OI, torch.randn(tokens, in_features, generator=generator) @ mix_II


def oracle(
    weight: np.ndarray, inputs: np.ndarray, n: int, m: int, damp: float, update: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The equations column by column, without blocks, from the explicit inverse of the Hessian."""
    weight = weight.astype(np.float64).copy()
    hessian = 2.0 / len(inputs) * inputs.T.astype(np.float64) @ inputs.astype(np.float64)
    for j in range(len(hessian)):
        if hessian[j, j] == 0:
            hessian[j, j] = 1.0
            weight[:, j] = 0.0
    hessian += damp * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    mask = np.zeros(weight.shape, dtype=bool)
    for j in range(weight.shape[1]):
        if j % m == 0:
            for i in range(weight.shape[0]):
                score = [(weight[i, k] / factor[k, k]) ** 2 for k in range(j, j + m)]
                for k in sorted(range(m), key=lambda k: -score[k])[:n]:
                    mask[i, j + k] = True
        if update:
            for i in range(weight.shape[0]):
                if not mask[i, j]:
                    error = weight[i, j] / factor[j, j]
                    weight[i, j:] -= error * factor[j, j:]
                    weight[i, j] = 0.0
    return mask, weight


def error(weight_OI: Tensor, solved_OI: Tensor, x_TI: Tensor) -> float:
    return float(((weight_OI - solved_OI).double() @ x_TI.double().T).square().sum())


@pytest.mark.parametrize("block", [8, 24, 128])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_matches_the_equations(n: int, m: int, block: int) -> None:
    weight_OI, x_TI = layer()
    x_TI[:, 5] = 0
    method = SparseGPT(block=block)
    solution = method.solve(weight_OI, method.observe(None, x_TI), NMPattern(n, m))
    mask, weight = oracle(weight_OI.numpy(), x_TI.numpy(), n, m, method.damp, update=True)
    assert np.array_equal(solution.mask.numpy(), mask)
    assert solution.weight is not None
    np.testing.assert_allclose(solution.weight.numpy(), weight, atol=2e-4)


def test_mask_only_scores_the_original_weights() -> None:
    weight_OI, x_TI = layer(seed=1)
    x_TI[:, 5] = 0
    method = SparseGPT(update=False)
    solution = method.solve(weight_OI, method.observe(None, x_TI), PATTERN)
    mask, _ = oracle(weight_OI.numpy(), x_TI.numpy(), 2, 4, method.damp, update=False)
    assert np.array_equal(solution.mask.numpy(), mask)
    assert solution.weight is None
    updated = SparseGPT().solve(weight_OI, method.observe(None, x_TI), PATTERN)
    assert not torch.equal(updated.mask, solution.mask)


def test_uncorrelated_inputs_give_magnitude_and_leave_kept_weights_alone() -> None:
    weight_OI, _ = layer()
    solution = SparseGPT().solve(weight_OI, Gram(torch.eye(32) * 3.0, 7), PATTERN)
    assert torch.equal(solution.mask, Magnitude().solve(weight_OI, None, PATTERN).mask)
    assert solution.weight is not None
    assert torch.equal(solution.weight, weight_OI * solution.mask)


def test_the_update_repairs_what_pruning_broke() -> None:
    weight_OI, x_TI = layer(tokens=400)
    method = SparseGPT()
    solution = method.solve(weight_OI, method.observe(None, x_TI), PATTERN)
    assert solution.weight is not None
    repaired = error(weight_OI, solution.weight, x_TI)
    assert repaired < 0.8 * error(weight_OI, weight_OI * solution.mask, x_TI)
    magnitude = Magnitude().solve(weight_OI, None, PATTERN).mask
    assert repaired < 0.8 * error(weight_OI, weight_OI * magnitude, x_TI)


def test_dead_features_are_zeroed_and_dropped_first() -> None:
    weight_OI, x_TI = layer()
    weight_OI[:, 6] = 1000.0
    x_TI[:, 6] = 0
    method = SparseGPT()
    solution = method.solve(weight_OI, method.observe(None, x_TI), PATTERN)
    assert solution.weight is not None
    assert not solution.mask[:, 6].any() and (solution.weight[:, 6] == 0).all()
    assert solution.weight.abs().max() < 100


def test_more_damping_is_tried_when_the_factorisation_fails() -> None:
    weight_OI, _ = layer()
    x_TI = torch.full((3, 32), 7.0)
    method = SparseGPT(damp=1e-9)
    gram = method.observe(None, x_TI)
    damped = gram.sum_II * (2 / 3) * (1 + 1e-9 * torch.eye(32))
    assert torch.linalg.cholesky_ex(damped).info != 0, "the first attempt must fail for this test to mean anything"
    solution = method.solve(weight_OI, gram, PATTERN)
    assert solution.weight is not None and torch.isfinite(solution.weight).all()


def test_a_hopeless_hessian_is_a_numerical_error() -> None:
    weight_OI, _ = layer()
    with pytest.raises(NumericalError, match=r"damping \[0\.01, 0\.1\].*method\.damp"):
        SparseGPT().solve(weight_OI, Gram(torch.eye(32) - torch.ones(32, 32), 1), PATTERN)
    with pytest.raises(NumericalError):
        SparseGPT().solve(weight_OI, Gram(torch.full((32, 32), torch.nan), 1), PATTERN)


@pytest.mark.parametrize(
    ("damp", "tried"),
    [
        (0.01, "0.01, 0.1"),
        (0.03, "0.03, 0.1"),
        (0.002, "0.002, 0.02, 0.1"),
        (1e-4, "0.0001, 0.001, 0.01, 0.1"),
        (0.1, "0.1"),
        (0.5, "0.5"),
    ],
)
def test_damping_is_raised_to_a_tenth_and_no_further(damp: float, tried: str) -> None:
    weight_OI, _ = layer()
    with pytest.raises(NumericalError, match=re.escape(f"damping [{tried}];")):
        SparseGPT(damp=damp).solve(weight_OI, Gram(torch.eye(32) - torch.ones(32, 32), 1), PATTERN)


def test_the_last_damping_counts() -> None:
    """A Hessian that needs more than 0.03 of its mean diagonal and less than 0.1."""
    weight_OI, _ = layer()
    hessian_II = torch.eye(32) - torch.ones(32, 32) / 30
    solution = SparseGPT(damp=0.03).solve(weight_OI, Gram(hessian_II, 2), PATTERN)
    assert solution.weight is not None and torch.isfinite(solution.weight).all()


@pytest.mark.parametrize("damp", [0.0, -1.0, float("nan"), float("inf")])
def test_damp_must_be_positive(damp: float) -> None:
    with pytest.raises(RecipeError, match=r"method\.damp"):
        SparseGPT(damp=damp)


def test_block_must_hold_whole_groups() -> None:
    weight_OI, x_TI = layer()
    with pytest.raises(RecipeError, match=r"method\.block 0"):
        SparseGPT(block=0)
    method = SparseGPT(block=12)
    with pytest.raises(RecipeError, match=r"method\.block 12: not a multiple of 8"):
        method.solve(weight_OI, method.observe(None, x_TI), NMPattern(4, 8))
