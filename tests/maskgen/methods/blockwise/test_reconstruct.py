"""The arithmetic of block reconstruction: its loss, its rates, and what a step does to kept and pruned weights.

Legend: B = windows, T = tokens, D = hidden size, O = out features, I = in features.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import create
from maskgen.methods.blockwise.reconstruct import Reconstruct
from maskgen.recipes import recipe
from tests.maskgen.arithmetic import processor_has_bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_token_counts_the_same_whatever_its_length() -> None:
    method, wanted_BTD, error_BTD = Reconstruct(), random(2, 5, 8), random(2, 5, 8, seed=1)
    loss = method.loss(wanted_BTD + error_BTD, wanted_BTD)
    assert method.loss(wanted_BTD, wanted_BTD) == 0 < loss
    lengths_BT1 = torch.logspace(-2, 3, 10).view(2, 5, 1)
    torch.testing.assert_close(method.loss((wanted_BTD + error_BTD) * lengths_BT1, wanted_BTD * lengths_BT1), loss)
    by_hand = [
        float((error_D @ error_D) / (wanted_D @ wanted_D))
        for error_D, wanted_D in zip(error_BTD.flatten(0, 1), wanted_BTD.flatten(0, 1), strict=True)
    ]
    assert float(loss) == pytest.approx(sum(by_hand) / 10, rel=1e-5)


def test_a_token_of_zeros_is_no_division_by_zero() -> None:
    wanted_BTD = torch.zeros(1, 1, 4)
    assert Reconstruct().loss(wanted_BTD, wanted_BTD) == 0


def test_the_rate_rises_and_falls() -> None:
    method = Reconstruct(lr=1.0, warmup=0.1, final_lr=0.2)
    rates = [method.lr_at(step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 10 and max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.2 <= rates[-1] < 0.21


def test_kept_weights_are_fitted_and_pruned_ones_stay_exactly_zero() -> None:
    """A layer whose wanted output a 2:4 weight can give: training finds it, from weights with another scale."""
    right_OI, x_BTI = random(6, 8), random(4, 16, 8, seed=1)
    mask_OI = NMPattern(2, 4).mask_from_scores(right_OI.abs())
    wanted_BTO = x_BTI @ (right_OI * mask_OI).T
    weight_OI = (random(6, 8, seed=2) * mask_OI).requires_grad_(True)
    fit = Reconstruct(lr=0.05).fit([weight_OI], [mask_OI], 300)
    losses = [fit.step(x_BTI @ weight_OI.T, wanted_BTO) for _ in range(300)]
    assert losses[-1] < 1e-4 < losses[0]
    assert (weight_OI[~mask_OI] == 0).all() and (weight_OI[mask_OI] != 0).all()
    torch.testing.assert_close(weight_OI.detach(), right_OI * mask_OI, rtol=0, atol=0.05)


def test_weights_of_any_size_are_trained_alike() -> None:
    """The rate is a share of their size: eight times as large ones take the same way."""
    mask_OI = NMPattern(2, 4).mask_from_scores(random(6, 8).abs())

    def trained(scale: float) -> Tensor:
        weight_OI = (scale * random(6, 8, seed=2) * mask_OI).requires_grad_(True)
        x_BTI, wanted_BTO = random(4, 16, 8, seed=1), scale * random(4, 16, 6, seed=3)
        fit = Reconstruct().fit([weight_OI], [mask_OI], 20)
        for _ in range(20):
            fit.step(x_BTI @ weight_OI.T, wanted_BTO)
        return weight_OI.detach()

    torch.testing.assert_close(trained(8.0), 8 * trained(1.0), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(trained(1.0), random(6, 8, seed=2) * mask_OI, atol=0.05)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    weight_OI = torch.ones(2, 4, requires_grad=True)
    fit = Reconstruct().fit([weight_OI], [torch.ones(2, 4, dtype=torch.bool)], 5)
    assert fit.step(weight_OI[None] * torch.inf, torch.ones(1, 2, 4)) == torch.inf
    assert torch.equal(weight_OI, torch.ones(2, 4)) and weight_OI.grad is None


def test_a_weight_that_no_token_reached_stays() -> None:
    used_OI, idle_OI = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    mask_OI = torch.ones(2, 4, dtype=torch.bool)
    Reconstruct().fit([used_OI, idle_OI], [mask_OI, mask_OI], 5).step(used_OI[None], torch.zeros(1, 2, 4) + 2)
    assert torch.equal(idle_OI, torch.ones(2, 4)) and not torch.equal(used_OI, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("dtype", "fast", "computed"),
    [("auto", True, torch.bfloat16), ("auto", False, torch.float32), ("bfloat16", False, torch.bfloat16)],
)
def test_the_arithmetic_is_that_of_the_device(
    dtype: str, fast: bool, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has_bfloat16(monkeypatch, fast)
    settled = recipe.load("reconstruct", [f"method.dtype={dtype}"]).on_device("cpu").method
    assert settled.options["dtype"] == str(computed).removeprefix("torch.")
    method = settled.build()
    assert isinstance(method, Reconstruct) and method.compute_dtype is computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "method.epochs 0: expected a positive number, such as 8"),
        ({"lr": 0.0}, "method.lr 0.0: expected a positive number"),
        ({"warmup": 1.5}, "method.warmup 1.5: expected a number from 0 to 1"),
        ({"inputs": "both"}, "method.inputs 'both': expected one of ['dense', 'mixed', 'pruned']"),
        ({"dtype": "float16"}, "method.dtype 'float16': expected one of ['auto', 'bfloat16', 'float32']"),
        ({"steps": 3}, "method.steps: reconstruct has no such option"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        create("reconstruct", options)
