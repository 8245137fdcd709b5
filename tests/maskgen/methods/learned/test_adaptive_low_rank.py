"""AST beside a low-rank correction: where it starts, that it trains, and what is exported.

Legend: T = tokens, O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import RecipeError
from maskgen.methods import Correction
from maskgen.methods.learned import TargetLayer
from maskgen.methods.learned.adaptive_sparse import AdaptiveLinear, AdaptiveSparse
from tests.maskgen.methods.learned.adaptive import IN, OUT, PATTERN, attach, magnitude, random

METHOD = AdaptiveSparse(rank=3, weights="prior")


def attach_to(given: Correction) -> AdaptiveLinear:
    linear = nn.Linear(IN, OUT).requires_grad_(False)
    target = TargetLayer(0, "a", linear, PATTERN, magnitude(linear.weight), correction=given)
    layer = METHOD.attach(target, torch.Generator())
    assert isinstance(layer, AdaptiveLinear)
    return layer


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_it_starts_as_the_given_product_with_both_factors_of_a_size(size: float) -> None:
    given = Correction(random(OUT, 3, seed=1) * size, random(3, IN, seed=2))
    layer = attach_to(given)
    assert layer.out is not None and layer.pool is not None
    assert given.pool is not None
    torch.testing.assert_close(layer.out @ layer.pool, given.out @ given.pool, rtol=1e-4, atol=size * 1e-5)
    torch.testing.assert_close(layer.out.norm(dim=0), layer.pool.norm(dim=1), rtol=1e-4, atol=0)
    x_TI = random(5, IN, seed=3)
    dense_OI = layer.weight * layer.kept_OI + given.out @ given.pool
    torch.testing.assert_close(layer(x_TI), x_TI @ dense_OI.T + layer.bias, rtol=1e-3, atol=size * 1e-4)


def test_a_column_of_zeros_stays_finite_and_can_grow() -> None:
    out_OR = random(OUT, 3, seed=1)
    out_OR[:, 1] = 0
    layer = attach_to(Correction(out_OR, random(3, IN, seed=2)))
    layer(random(5, IN, seed=3)).square().sum().backward()
    assert layer.out is not None and layer.out.grad is not None
    assert bool(layer.out.isfinite().all()) and bool(layer.out.grad[:, 1].any())


def test_without_one_it_starts_as_the_strict_layer_and_the_seed_decides_the_rest() -> None:
    method = AdaptiveSparse(rank=3)
    layer, same, other, strict = attach(method), attach(method), attach(method, seed=1), attach(AdaptiveSparse())
    x_TI = random(5, IN, seed=3)
    assert torch.equal(layer(x_TI), strict(x_TI))
    assert layer.pool is not None and same.pool is not None and other.pool is not None
    assert torch.equal(layer.pool, same.pool) and not torch.equal(layer.pool, other.pool)


def test_both_factors_train_and_are_exported() -> None:
    layer = attach_to(Correction(random(OUT, 3, seed=1), random(3, IN, seed=2)))
    before = copy.deepcopy(layer).solution().correction
    optimizer = METHOD.optimizer({"a": layer}, [], 1e-2)
    x_TI = random(5, IN, seed=3)
    layer(x_TI).square().sum().backward()
    optimizer.step()
    after = layer.solution().correction
    assert before is not None and after is not None and before.pool is not None and after.pool is not None
    assert not torch.equal(before.out, after.out) and not torch.equal(before.pool, after.pool)
    assert METHOD.correction == LowRankCorrection(3)
    dense_OI = layer.weight * layer.kept_OI + after.out @ after.pool
    torch.testing.assert_close(layer(x_TI), x_TI @ dense_OI.T + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"rank": -1}, {"rank": 4, "slorb_segment": 8}])
def test_options_that_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"method\.rank"):
        AdaptiveSparse(**options)  # type: ignore[arg-type]
