"""Pruning and rounding in one pass: what is stored is int4, and what follows is calibrated on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maskgen.core.errors import RecipeError
from maskgen.recipes import recipe as recipe_module
from tests import models
from tests.maskgen.sweeping import recipe, run

INT4 = ("values.kind=int4", "values.group=64")


@pytest.mark.parametrize("name", ["sparsegpt", "sparsegpt-mask-only", "admm"])
def test_every_layer_is_stored_in_four_bits(name: str, tmp_path: Path) -> None:
    model, wanted = models.build("llama"), recipe(name, *INT4)
    _, work = run(model, wanted, tmp_path / "work")
    float_model = models.build("llama")
    _, floats = run(float_model, recipe(name), tmp_path / "floats")
    weights = dict(model.named_modules())
    for layer in work.mask_set("sha256:" + "b" * 64, wanted.digest()).names:
        packed = work.packed(layer)
        packed.verify(layer)
        assert (packed.kind, packed.group) == ("int4", 64)
        assert torch.equal(weights[layer].weight, packed.unpack()), "what follows is calibrated on what is stored"
    first = "model.layers.0.self_attn.q_proj"
    exact, codes = floats.packed(first), work.packed(first)
    assert torch.equal(exact.bitmask, codes.bitmask), "nothing was rounded before it"
    assert (codes.unpack() - exact.unpack()).norm() < 0.3 * exact.unpack().norm()


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("name", ["magnitude", "sparsegpt", "admm"])
def test_values_of_eight_bits_are_those_that_quantising_gives(name: str, kind: str, tmp_path: Path) -> None:
    model, wanted = models.build("llama"), recipe(name, f"values.kind={kind}")
    _, work = run(model, wanted, tmp_path / "work")
    _, floats = run(models.build("llama"), recipe(name), tmp_path / "floats")
    first, weights = "model.layers.0.self_attn.q_proj", dict(model.named_modules())
    exact, codes = floats.packed(first).quantised(kind), work.packed(first)
    assert torch.equal(exact.values.view(torch.uint8), codes.values.view(torch.uint8))
    assert codes.scale is not None and exact.scale is not None and torch.equal(codes.scale, exact.scale)
    for layer in work.mask_set("sha256:" + "b" * 64, wanted.digest()).names:
        work.packed(layer).verify(layer)
        assert torch.equal(weights[layer].weight, work.packed(layer).unpack()), "what follows sees what is stored"


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    wanted = recipe("sparsegpt", *INT4)
    _, whole = run(models.build("llama"), wanted, tmp_path / "work")
    name = whole.mask_set("sha256:" + "b" * 64, wanted.digest()).names[-1]
    before = whole.packed(name).values.clone()
    (tmp_path / "work" / "block-00001.safetensors").unlink()
    report, again = run(models.build("llama"), wanted, tmp_path / "work")
    assert report.resumed_blocks >= 1 and torch.equal(again.packed(name).values, before)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("magnitude", INT4, r"\[values\]: magnitude does not see how inputs go together, as admm and sparsegpt do"),
        ("maskllm", INT4, r"\[values\]: maskllm does not round what it makes"),
        ("magnitude", (*INT4, "budget.bytes=0.7"), r"\[values\]: magnitude does not see how inputs go together"),
        ("admm", (*INT4, "budget.speedup=1.4"), r"\[values\] and budget.speedup: kernel tables .* not for int4"),
        ("admm", ("values.kind=int8", "values.group=64"), r"values.group 64: int8 values have a scale for each row"),
        ("admm", ("values.kind=int3",), "values.kind"),
        ("admm", ("values.kind=int4", "values.group=32"), "values.group"),
        (
            "admm",
            ("values.kind=int4", "values.size=32"),
            r"unknown key values.size; known keys are \['group', 'kind'\]",
        ),
    ],
)
def test_recipes_that_are_refused(name: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(name, *overrides)


def test_a_recipe_without_the_section_has_the_digest_it_had() -> None:
    assert "values" not in recipe_module.load("admm").resolved()
    assert recipe_module.load("admm", INT4).resolved()["values"] == {"kind": "int4", "group": 64}
    assert recipe_module.load("admm", INT4[:1]).resolved()["values"] == {"kind": "int4", "group": 128}
    assert recipe_module.load("admm", ["values.kind=int8"]).resolved()["values"] == {"kind": "int8", "group": None}
