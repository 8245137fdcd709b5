"""The dynamics of MaskPrune: bottom norm, prox, duals, widths; on a toy whose right answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import StepContext, TargetLayer
from maskgen.methods.learned.maskprune import (
    MaskPrune,
    MaskPruneLinear,
    bottom_norm,
    bottom_norm_slope,
    prox,
    taylor_agreement,
)
from maskgen.numerics.unit_linear import sites
from maskgen.numerics.units import NEURONS

LAYERS, UNITS, KEPT, HIDDEN = 8, 64, 32, 16
SETTINGS: dict[str, Any] = {
    "keep_ffn": KEPT,
    "ffn_multiple": 16,
    "lora_rank": 0,
    "mask_lr": 60.0,
    "shrink": 0.3,
    "dual_lr": 1.0,
    "augmented": 0.1,
    "init_until": 0.05,
    "ramp_until": 0.4,
    "settle": 0.6,
}
"""The toy's gradients are cleaner than a language model's, so masks move faster and choose by themselves."""

MASKS = st.lists(st.floats(-2, 2).map(lambda value: round(value, 3)), min_size=2, max_size=12)


@settings(max_examples=50, deadline=None)
@given(MASKS, st.data())
def test_the_bottom_norm_is_zero_exactly_when_that_many_masks_are(values: list[float], data: st.DataObject) -> None:
    mask_U = torch.tensor(values, dtype=torch.float64)
    removed = data.draw(st.integers(0, len(values)))
    assert (bottom_norm(mask_U, removed) == 0) == (int((mask_U == 0).sum()) >= removed)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 8.0))
def test_the_gradients_of_the_bottom_norm(seed: int, removed: float) -> None:
    mask_U = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    bottom_norm(mask_U, removed).backward()
    order = mask_U.detach().abs().argsort()
    wanted_U = 2 * mask_U.detach()
    wanted_U[order[math.ceil(removed) :]] = 0
    assert mask_U.grad is not None
    torch.testing.assert_close(mask_U.grad, wanted_U)
    whole = math.ceil(removed)
    one_more = bottom_norm(mask_U, whole + 1) - bottom_norm(mask_U, whole)
    torch.testing.assert_close(bottom_norm_slope(mask_U, removed), one_more)
    assert bottom_norm_slope(mask_U, 9) == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 6), st.floats(0.0, 20.0))
def test_the_prox_is_the_minimiser(seed: int, removed: int, strength: float) -> None:
    """Against every choice of which units shrink, and against random points nearby."""
    generator = torch.Generator().manual_seed(seed)
    mask_U = torch.randn(6, dtype=torch.float64, generator=generator)

    def objective(v_XU: Tensor) -> Tensor:
        bottom_X = v_XU.square().sort(-1).values[..., :removed].sum(-1)
        return (v_XU - mask_U).square().sum(-1) / 2 + strength * bottom_X

    best = objective(prox(mask_U, removed, strength))
    chosen_XU = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).double()
    chosen_XU = chosen_XU[chosen_XU.sum(-1) == removed]
    shrunk_XU = torch.where(chosen_XU.bool(), mask_U / (1 + 2 * strength), mask_U)
    nearby_XU = prox(mask_U, removed, strength) + torch.randn(200, 6, dtype=torch.float64, generator=generator) * 0.3
    assert best <= objective(shrunk_XU).min() + 1e-9
    assert best <= objective(nearby_XU).min() + 1e-9


def make(method: MaskPrune, **shape: int) -> tuple[dict[str, MaskPruneLinear], torch.optim.Optimizer]:
    """The FFNs of a model, attached."""
    torch.manual_seed(0)
    layers, generator = {}, torch.Generator().manual_seed(0)
    for number in range(LAYERS):
        linears = {leaf: nn.Linear(HIDDEN, UNITS, bias=False) for leaf in ("gate_proj", "up_proj")}
        linears[NEURONS] = nn.Linear(UNITS, HIDDEN, bias=False)
        for leaf, linear in linears.items():
            linear.requires_grad_(False)
            name = f"layers.{number}.mlp.{leaf}"
            target = TargetLayer(len(layers), name, linear, NMPattern(2, 4), units=UNITS if leaf == NEURONS else None)
            layers[name] = cast(MaskPruneLinear, method.attach(target, generator))
    optimizer = method.optimizer(layers, [], 1e-3)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return layers, optimizer


class Toy:
    """L = sum over units of c (1 - m)^2 / 2, with noise on its gradient: the least important c should go."""

    def __init__(self, steps: int = 300, noise: float = 0.5, **options: Any) -> None:
        self.method = MaskPrune(**{**SETTINGS, **options})
        self.layers, self.optimizer = make(self.method)
        self.steps, self.noise, self.sites = steps, noise, sites(self.layers)
        self.generator = torch.Generator().manual_seed(1)
        self.costs = {name: torch.rand(UNITS, generator=self.generator) ** 3 for name in self.sites}
        self.history: list[Mapping[str, float]] = []

    def step(self, number: int) -> None:
        context = StepContext(number, self.steps)
        for layer in self.layers.values():
            layer.context = context
        loss = torch.zeros(())
        for name, layer in self.sites.items():
            noise_U = torch.randn(UNITS, generator=self.generator) * self.noise * self.costs[name]
            loss = loss + (self.costs[name] * (1 - layer.mask_U).square() / 2 + noise_U * layer.mask_U).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.method.after_step(self.layers, context, 1e-3)
        first = next(iter(self.sites.values()))
        bottom = max(float(bottom_norm(x.mask_U.detach(), x.units_to_remove)) for x in self.sites.values())
        duals = [float(x.y) for x in self.sites.values()]
        self.history.append({"s": float(first.s), "z": float(first.z), "y": max(duals), "bottom": bottom})

    def run(self) -> Toy:
        for number in range(self.steps):
            self.step(number)
        return self

    def lost(self) -> float:
        """Importance that went, over the least that could go."""
        went = best = 0.0
        for name, kept_U in self.method.kept_units(self.layers).items():
            went += float(self.costs[name][~kept_U].sum())
            best += float(self.costs[name].sort().values[: UNITS - KEPT].sum())
        return went / best


@pytest.mark.parametrize("init", ["taylor", "ones"])
def test_the_ramp_removes_the_least_important(init: str) -> None:
    toy = Toy(init=init).run()
    widths = [context["s"] for context in toy.history]
    assert widths == sorted(widths), "a ramp is monotone"
    assert widths[-1] == UNITS - KEPT
    assert all(math.isfinite(context["y"]) and context["y"] < 1e3 for context in toy.history)
    assert toy.lost() < 1.1
    before = toy.history[int(0.6 * toy.steps) - 2]["bottom"]
    assert before < 0.05 * (UNITS - KEPT), "the bottom has all but gone when it is cut"
    assert toy.history[-1]["bottom"] == 0, "and stays gone"


def test_a_common_shrink_is_what_tells_masks_apart() -> None:
    """Without it and without a ranking to start from, noise chooses: the failure the shrink is there for."""
    assert Toy(init="ones", shrink=0.0).run().lost() > 2
    assert Toy(init="ones").run().lost() < 1.1


def test_the_saddle_stays_bounded_and_ends_on_the_budget() -> None:
    """Minimax: s climbs to the target without passing it, z rests from the crossing on, all layers agree."""
    toy = Toy(budget="minimax", keep_ffn=0, keep_parameters=0.5, width_lr=0.02).run()
    widths, duals = [context["s"] for context in toy.history], [context["z"] for context in toy.history]
    assert max(widths) <= UNITS - KEPT
    assert widths[-1] == UNITS - KEPT
    crossing = next(number for number, width in enumerate(widths) if width == UNITS - KEPT)
    assert 20 < crossing < 0.6 * toy.steps, "by itself, before the selection settles"
    assert 0 < max(duals) == duals[crossing] == duals[-1]
    assert all(context["y"] < 1e3 for context in toy.history)
    assert {int(kept_U.sum()) for kept_U in toy.method.kept_units(toy.layers).values()} == {KEPT}
    assert toy.lost() < 1.1


def test_a_budget_that_is_not_crossed_in_time_is_met_all_the_same() -> None:
    toy = Toy(steps=40, budget="minimax", keep_ffn=0, keep_parameters=0.5, width_lr=1e-5).run()
    assert toy.history[20]["s"] < 1
    assert {int(kept_U.sum()) for kept_U in toy.method.kept_units(toy.layers).values()} == {KEPT}
    assert toy.history[-1]["bottom"] == 0


def test_masks_rest_at_one_until_their_importance_is_known() -> None:
    toy = Toy(steps=100)
    for number in range(4):
        toy.step(number)
        assert all((layer.masks() == 1).all() for layer in toy.sites.values())
    toy.step(4)
    for layer in toy.sites.values():
        order = layer.importance_U.argsort()
        assert (layer.masks()[order].diff() > 0).all(), "the starting masks are in the order of importance"
        assert layer.masks().aminmax() == (pytest.approx(0.7), 1.0)


def test_the_selection_is_compared_with_a_taylor_ranking(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    toy = Toy(steps=60).run()
    (record,) = [record for record in caplog.records if "agreement with the Taylor ranking" in record.message]
    assert NEURONS in record.message
    share = taylor_agreement(toy.layers)[NEURONS]
    assert 0.5 < share <= 1
    for layer in toy.sites.values():
        layer.set_masks(layer.importance_U)
    assert taylor_agreement(toy.layers) == {NEURONS: 1.0}


def test_no_gradient_at_masks_of_one_is_an_error() -> None:
    toy = Toy(noise=0.0)  # the toy's loss is flat there, as distillation is
    with pytest.raises(NumericalError, match="distill_weight"):
        toy.run()


def test_a_run_that_goes_on_from_its_state_ends_the_same() -> None:
    """Everything the dynamics remember is in parameters, buffers and the optimiser."""
    straight, first, second = (Toy(steps=24, budget="minimax", keep_ffn=0, width_lr=0.05) for _ in range(3))
    straight.run()
    for number in range(9):
        first.step(number)
    for name, layer in first.layers.items():
        second.layers[name].load_state_dict(layer.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.generator = first.generator
    for number in range(9, 24):
        second.step(number)
    for name, layer in straight.layers.items():
        other = second.layers[name].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in layer.state_dict().items()), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"init": "noise"},
        {"budget": "fixed"},
        {"init_until": 0.5},
        {"settle": 0.2},
        {"keep_parameters": 1.5},
        {"keep_kv_groups": -1},
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        MaskPrune(**wrong)
