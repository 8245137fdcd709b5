"""One-shot choices of units: what they rank by, when they choose, and what they leave alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import StepContext, TargetLayer
from maskgen.methods.learned.structured import Structured, StructuredLinear, magnitude
from maskgen.numerics.unit_linear import sites
from maskgen.numerics.units import NEURONS

UNITS, KEPT, HIDDEN = 32, 16, 8


def make(**options: Any) -> tuple[Structured, dict[str, StructuredLinear], torch.optim.Optimizer]:
    """One FFN, attached."""
    method = Structured(**{"keep_ffn": KEPT, "ffn_multiple": 16, "score_steps": 3, **options})
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    linears = {leaf: nn.Linear(HIDDEN, UNITS, bias=False) for leaf in ("gate_proj", "up_proj")}
    linears[NEURONS] = nn.Linear(UNITS, HIDDEN, bias=False)
    layers = {}
    for index, (leaf, linear) in enumerate(linears.items()):
        linear.requires_grad_(False)
        target = TargetLayer(index, f"mlp.{leaf}", linear, NMPattern(2, 4), units=UNITS if leaf == NEURONS else None)
        layers[target.name] = cast(StructuredLinear, method.attach(target, generator))
    return method, layers, method.optimizer(layers, [], 1e-2)


def run(
    method: Structured, layers: dict[str, StructuredLinear], optimizer: torch.optim.Optimizer, slope_U: torch.Tensor
) -> list[int]:
    """Five steps with this gradient of the masks; how many masks are 1 after each."""
    (target,) = sites(layers).values()
    ones = []
    for step in range(5):
        for layer in layers.values():
            layer.context = StepContext(step, 5)
        (target.mask_U * slope_U).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(layers, StepContext(step, 5), 1e-2)
        ones.append(int((target.masks() == 1).sum()))
    return ones


def test_taylor_keeps_the_steepest_whatever_their_sign() -> None:
    method, layers, optimizer = make()
    slope_U = torch.randn(UNITS, generator=torch.Generator().manual_seed(1))
    assert run(method, layers, optimizer, slope_U) == [UNITS, UNITS, KEPT, KEPT, KEPT], "chosen after score_steps"
    kept_U = method.kept_units(layers)["mlp.down_proj"]
    assert kept_U.sum() == KEPT
    assert slope_U[kept_U].abs().min() >= slope_U[~kept_U].abs().max()
    (target,) = sites(layers).values()
    assert set(target.masks().tolist()) == {0.0, 1.0}


def test_magnitude_counts_all_weights_of_a_unit() -> None:
    method, layers, optimizer = make(score="magnitude")
    with torch.no_grad():
        layers["mlp.up_proj"].weight[5] = 0
        layers["mlp.gate_proj"].weight[5] = 0
        layers["mlp.down_proj"].weight[:, 5] = 0
        layers["mlp.up_proj"].weight[7] = 50
    wanted_U = layers["mlp.down_proj"].weight.square().sum(0)
    for leaf in ("gate_proj", "up_proj"):
        wanted_U = wanted_U + layers[f"mlp.{leaf}"].weight.square().sum(1)
    torch.testing.assert_close(magnitude("mlp.down_proj", layers), wanted_U)
    run(method, layers, optimizer, torch.ones(UNITS))
    kept_U = method.kept_units(layers)["mlp.down_proj"]
    assert kept_U[7] and not kept_U[5]
    assert wanted_U[kept_U].min() >= wanted_U[~kept_U].max()


def test_weights_stay_as_they_are_without_adapters() -> None:
    method, layers, optimizer = make()
    before = layers["mlp.up_proj"].weight.clone()
    run(method, layers, optimizer, torch.randn(UNITS, generator=torch.Generator().manual_seed(1)))
    solution = layers["mlp.up_proj"].solution()
    assert solution.weight is not None and torch.equal(solution.weight, before)
    down = layers["mlp.down_proj"].solution()
    assert down.weight is not None
    assert torch.equal(down.weight, layers["mlp.down_proj"].weight * down.mask)


def test_no_gradient_is_an_error_not_a_ranking() -> None:
    method, layers, optimizer = make()
    with pytest.raises(NumericalError, match="distill_weight"):
        run(method, layers, optimizer, torch.zeros(UNITS))


@pytest.mark.parametrize("wrong", [{"score": "wanda"}, {"score_steps": 0}, {"keep_parameters": 2.0}])
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"method.{next(iter(wrong))}"):
        Structured(**wrong)
