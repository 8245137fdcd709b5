"""AST: where gradients go, the mask's calendar, SLoRB, what is exported. Its optimiser: `test_annealed_adamw`.

Legend: T = tokens, O = out features, I = in features, K = runs of inputs.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.errors import RecipeError
from maskgen.methods.learned import Mode, StepContext
from maskgen.methods.learned.adaptive_sparse import AdaptiveLinear, AdaptiveSparse
from tests.maskgen.methods.learned.adaptive import IN, OUT, PATTERN, attach, magnitude, random


def test_the_gradient_reaches_pruned_weights_too() -> None:
    layer = attach(AdaptiveSparse())
    x_TI, dy_TO = random(20, IN, seed=1), random(20, OUT, seed=2)
    y_TO = layer(x_TI)
    torch.testing.assert_close(y_TO, x_TI @ (layer.weight * layer.kept_OI).T + layer.bias)
    y_TO.backward(dy_TO)
    torch.testing.assert_close(layer.weight.grad, dy_TO.T @ x_TI)
    assert layer.weight.grad is not None and (layer.weight.grad[~layer.kept_OI] != 0).all()
    assert layer.bias.grad is None


@pytest.mark.parametrize(("refresh_every", "settle"), [(10, 0.1), (7, 0.0), (1, 0.5)])
def test_the_mask_is_refreshed_on_its_days_only(refresh_every: int, settle: float) -> None:
    method = AdaptiveSparse(refresh_every=refresh_every, settle=settle)
    layer = attach(method)
    refreshed = []
    for at in range(60):
        layer.weight.data = random(OUT, IN, seed=at + 1)
        before_OI = layer.mask().clone()
        method.before_step({"a": layer}, StepContext(at, 60))
        if not torch.equal(layer.mask(), before_OI):
            assert torch.equal(layer.mask(), magnitude(layer.weight))
            refreshed.append(at)
    assert refreshed == [at for at in range(refresh_every, 60, refresh_every) if at < (1 - settle) * 60]


def train(method: AdaptiveSparse, steps: int, seed: int = 0, prior_OI: Tensor | None = None) -> list[AdaptiveLinear]:
    """Fit a layer to another that is nearly 2:4, by other columns; the layer after every step (deep copies)."""
    layer = attach(method, seed, prior_OI)
    target_OI = random(OUT, IN, seed=seed + 50)
    target_OI = target_OI.sign() * 0.2 * magnitude(target_OI) + target_OI * 0.01
    optimizer = method.optimizer({"a": layer}, [], 3e-3)
    states = []
    for at in range(steps):
        layer.context = StepContext(at, steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - at / steps)
        method.before_step({"a": layer}, layer.context)
        x_TI = random(64, IN, seed=1000 + at)
        (layer(x_TI) - layer.bias.detach() - x_TI @ target_OI.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(copy.deepcopy(layer))
    return states


def test_masks_move_early_and_rest_late_and_losers_vanish() -> None:
    states = train(AdaptiveSparse(masked_decay=2.0), steps=300)
    flips = [int((now.mask() ^ then.mask()).sum()) for then, now in itertools.pairwise(states)]
    assert sum(flips[:100]) > 10 * sum(flips[200:]) and sum(flips[-30:]) == 0
    weight_OI, kept_OI = states[-1].weight.detach().abs(), states[-1].mask()
    assert float(weight_OI[~kept_OI].mean() / weight_OI[kept_OI].mean()) < 1e-2
    assert not torch.equal(kept_OI, magnitude(states[0].weight))
    PATTERN.check_mask(kept_OI)


def test_a_prior_mask_stays_and_is_asked_for() -> None:
    method = AdaptiveSparse(mask="prior")
    assert method.uses_prior and not AdaptiveSparse().uses_prior
    prior_OI = magnitude(random(OUT, IN, seed=77))
    last = train(method, 30, prior_OI=prior_OI)[-1]
    assert torch.equal(last.mask(), prior_OI)
    assert not torch.equal(prior_OI, magnitude(attach(AdaptiveSparse()).weight))


def test_what_is_exported_is_what_was_trained_and_evaluated() -> None:
    layer = train(AdaptiveSparse(slorb_segment=8), 20)[-1]
    x_TI = random(5, IN, seed=3)
    trained_TO = layer(x_TI)
    layer.mode = Mode.HARD
    torch.testing.assert_close(layer(x_TI), trained_TO)
    solution = layer.solution()
    assert solution.weight is not None and solution.correction is not None
    assert torch.equal(solution.weight, layer.weight * layer.kept_OI) and not solution.weight.requires_grad
    dense_OI = solution.weight + solution.correction.out.repeat_interleave(8, dim=1)
    torch.testing.assert_close(x_TI @ dense_OI.T + layer.bias, trained_TO, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["fixed", "trained"])
@pytest.mark.parametrize("segment", [4, 16, 32])
def test_slorb_adds_s_x_and_starts_by_keeping_the_means_of_runs(segment: int, pool: str) -> None:
    layer = attach(AdaptiveSparse(slorb_segment=segment, slorb_pool=pool))
    correction = layer.solution().correction
    assert layer.out is not None and correction is not None and correction.out.shape == (OUT, IN // segment)
    pool_KI = torch.eye(IN // segment).repeat_interleave(segment, 1)
    assert (correction.pool is None) == (pool == "fixed")
    if correction.pool is not None:
        assert torch.equal(correction.pool, pool_KI)
        with torch.no_grad():
            assert layer.pool is not None
            pool_KI = layer.pool.mul_(random(*layer.pool.shape, seed=4)).clone()
    else:
        mean_OK = (layer.weight * layer.kept_OI + layer.out @ pool_KI).unflatten(1, (-1, segment)).mean(2)
        torch.testing.assert_close(mean_OK, layer.weight.unflatten(1, (-1, segment)).mean(2), rtol=0, atol=1e-7)
    x_TI = random(6, IN, seed=5)
    expected_TO = x_TI @ (layer.weight * layer.kept_OI + layer.out @ pool_KI).T + layer.bias
    torch.testing.assert_close(layer(x_TI), expected_TO, rtol=1e-4, atol=1e-5)
    parameters = sum(item.numel() for item in layer.parameters() if item.requires_grad) - OUT * IN
    assert parameters == OUT * IN // segment + (IN // segment * IN if pool == "trained" else 0)


def test_s_0_is_the_strict_layer() -> None:
    layer, strict = attach(AdaptiveSparse(slorb_segment=16)), attach(AdaptiveSparse())
    strict.bias = layer.bias
    assert layer.out is not None
    with torch.no_grad():
        layer.out.zero_()
    assert torch.equal(layer(torch.ones(3, IN)), strict(torch.ones(3, IN)))


def test_slorb_trains_and_is_not_started_again_by_a_refresh() -> None:
    method = AdaptiveSparse(slorb_segment=16, slorb_pool="trained", refresh_every=1)
    states = train(method, 40)
    start = attach(method)
    for trained, began in ((states[-1].out, start.out), (states[-1].pool, start.pool)):
        assert trained is not None and began is not None and not torch.equal(trained, began)
    layer = states[-1]
    assert layer.out is not None
    before_OK = layer.out.clone()
    layer.weight.data = random(OUT, IN, seed=9)
    method.before_step({"a": layer}, StepContext(1, 40))
    assert torch.equal(layer.mask(), magnitude(layer.weight)) and torch.equal(layer.out, before_OK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masked_decay": -1.0}, r"method\.masked_decay -1\.0"),
        ({"ramp": 1.5}, r"method\.ramp 1\.5: expected a number from 0 to 1"),
        ({"settle": float("nan")}, r"method\.settle nan"),
        ({"weight_decay": float("inf")}, r"method\.weight_decay inf"),
        ({"refresh_every": 0}, r"method\.refresh_every 0"),
        ({"slorb_segment": -16}, r"method\.slorb_segment -16"),
        ({"slorb_pool": "sum"}, r"method\.slorb_pool 'sum'.*'fixed', 'trained'"),
        ({"mask": "magnitude"}, r"method\.mask 'magnitude'.*'adaptive', 'prior'"),
        ({"second_moment": ""}, r"method\.second_moment ''"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AdaptiveSparse(**options)


def test_a_run_of_inputs_that_does_not_divide_the_layer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"method\.slorb_segment 12: does not divide the 32 inputs of a.*such as 4"):
        attach(AdaptiveSparse(slorb_segment=12))
