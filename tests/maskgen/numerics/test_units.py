"""Counting and choosing units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskgen.core.errors import ModelError, RecipeError
from maskgen.numerics import units
from maskgen.numerics.units import HEADS, NEURONS, Budget, LinearShape, ParameterCount, resolve_widths, top_units

DEFAULTS: dict[str, Any] = {
    "keep_parameters": 0.75,
    "keep_kv_groups": 0,
    "keep_ffn": 0,
    "tensor_parallel": 1,
    "ffn_multiple": 64,
    "heads_divide_hidden": True,
}


def budget(**changes: Any) -> Budget:
    return Budget(**{**DEFAULTS, **changes})


def shapes_of(
    layers: int, hidden: int, head: int, heads: int, groups: int, ffn: int, biased: bool
) -> dict[str, LinearShape]:
    """The linear layers of a Llama, by name."""
    rows = {"q_proj": heads * head, "k_proj": groups * head, "v_proj": groups * head}
    block = {f"attn.{leaf}": LinearShape(out, hidden, biased) for leaf, out in rows.items()}
    block |= {"attn.o_proj": LinearShape(hidden, heads * head, False), "mlp.down_proj": LinearShape(hidden, ffn, False)}
    block |= {f"mlp.{leaf}": LinearShape(ffn, hidden, False) for leaf in ("gate_proj", "up_proj")}
    return {f"layers.{number}.{name}": shape for number in range(layers) for name, shape in block.items()}


def count(
    layers: int, hidden: int, head: int, heads: int, groups: int, ffn: int, biased: bool = False
) -> ParameterCount:
    shapes = shapes_of(layers, hidden, head, heads, groups, ffn, biased)
    sites = {name: groups for name in shapes if name.endswith(HEADS)}
    sites |= {name: ffn for name in shapes if name.endswith(NEURONS)}
    return units.count_parameters(shapes, sites)


REFERENCE = count(8, 256, 64, 4, 2, 768)
LLAMA_7B = count(32, 4096, 128, 32, 32, 11008)
QWEN = count(2, 4096, 128, 32, 8, 12288, biased=True)


@given(groups=st.integers(1, 8), ffn=st.integers(1, 90), biased=st.booleans())
def test_the_fraction_is_that_of_the_sliced_shapes(groups: int, ffn: int, biased: bool) -> None:
    before = shapes_of(3, 24, 4, 16, 8, 90, biased)
    after = shapes_of(3, 24, 4, 2 * groups, groups, ffn, biased)
    fraction = count(3, 24, 4, 16, 8, 90, biased).fraction({HEADS: groups, NEURONS: ffn})
    wanted = sum(shape.parameters for shape in after.values()) / sum(shape.parameters for shape in before.values())
    assert fraction == pytest.approx(wanted, abs=1e-12)


@given(st.integers(0, 7), st.integers(0, 89))
def test_the_fraction_grows_with_either_width(groups: int, ffn: int) -> None:
    counted = count(3, 24, 4, 16, 8, 90)
    here = counted.fraction({HEADS: groups, NEURONS: ffn})
    assert counted.fraction({HEADS: groups + 1, NEURONS: ffn}) > here
    assert counted.fraction({HEADS: groups, NEURONS: ffn + 1}) > here


@given(st.floats(0.3, 0.97), st.sampled_from([1, 2, 4]), st.sampled_from([16, 64, 128]), st.booleans())
def test_widths_stay_inside_the_budget_and_can_be_served(
    keep_parameters: float, ranks: int, multiple: int, divide: bool
) -> None:
    asked = budget(
        keep_parameters=keep_parameters, tensor_parallel=ranks, ffn_multiple=multiple, heads_divide_hidden=divide
    )
    for counted in (LLAMA_7B, QWEN):
        keep = resolve_widths(counted, asked)
        heads = counted.kinds[HEADS]
        fraction = counted.fraction(keep)
        assert fraction <= keep_parameters + 1e-9
        one_more = counted.fraction({**keep, NEURONS: keep[NEURONS] + max(multiple, 16 * ranks)})
        assert keep[NEURONS] == counted.kinds[NEURONS].units or one_more > keep_parameters
        assert keep[NEURONS] % multiple == 0
        assert keep[NEURONS] % (16 * ranks) == 0
        assert keep[HEADS] * heads.heads_per_unit % ranks == 0
        assert keep[HEADS] >= keep_parameters * heads.units - 1e-6
        assert not divide or heads.hidden % (keep[HEADS] * heads.heads_per_unit) == 0


def test_a_quarter_less_of_known_models() -> None:
    assert resolve_widths(REFERENCE, budget()) == {HEADS: 2, NEURONS: 512}
    assert REFERENCE.fraction({HEADS: 2, NEURONS: 512}) == 0.75
    assert resolve_widths(REFERENCE, budget(keep_kv_groups=1)) == {HEADS: 1, NEURONS: 640}
    assert resolve_widths(LLAMA_7B, budget(heads_divide_hidden=False))[HEADS] == 24
    assert resolve_widths(LLAMA_7B, budget())[HEADS] == 32, "transformers refuses 24 heads beside a hidden size of 4096"


def test_explicit_widths_are_taken_or_refused() -> None:
    assert resolve_widths(REFERENCE, budget(keep_kv_groups=1, keep_ffn=256)) == {HEADS: 1, NEURONS: 256}
    for wrong in ({"keep_kv_groups": 3}, {"keep_ffn": 250}, {"keep_ffn": 1024}, {"keep_parameters": 0.1}):
        with pytest.raises(RecipeError, match="keep_"):
            resolve_widths(REFERENCE, budget(**wrong))
    with pytest.raises(RecipeError, match="expected one of"):
        resolve_widths(LLAMA_7B, budget(keep_kv_groups=24))


def test_heads_that_cannot_go_leave_all_to_the_ffn() -> None:
    shapes = shapes_of(2, 256, 64, 4, 2, 768, True)
    counted = units.count_parameters(shapes, {name: 768 for name in shapes if name.endswith(NEURONS)})
    keep = resolve_widths(counted, budget())
    assert keep == {NEURONS: 448}
    assert counted.fraction({NEURONS: 512}) > 0.75 > counted.fraction(keep), "biases of kept heads count, and stay"
    with pytest.raises(RecipeError, match="heads of this architecture"):
        resolve_widths(counted, budget(keep_kv_groups=1))


@pytest.mark.parametrize(
    "wrong",
    [{"keep_parameters": 1.0}, {"keep_parameters": 0.0}, {"keep_ffn": -1}, {"tensor_parallel": 0}, {"ffn_multiple": 0}],
)
def test_an_option_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        budget(**wrong)


def test_a_layer_that_is_missing_or_different_is_named() -> None:
    shapes = shapes_of(2, 24, 4, 4, 2, 32, False)
    sites = {name: 32 for name in shapes if name.endswith(NEURONS)}
    with pytest.raises(ModelError, match=r"layers.1.mlp.down_proj.*gate_proj"):
        units.count_parameters({name: shape for name, shape in shapes.items() if name != "layers.1.mlp.up_proj"}, sites)
    with pytest.raises(ModelError, match="uniform"):
        units.count_parameters({**shapes, "layers.1.mlp.up_proj": LinearShape(32, 12, False)}, sites)


def test_without_a_single_ffn_there_is_nothing_to_choose() -> None:
    """All down projections stay dense where their width is no multiple of 8."""
    with pytest.raises(ModelError, match="no down_proj of this model is pruned, so there are no neurons to remove"):
        resolve_widths(ParameterCount(100, {}), budget())


def test_the_first_of_equal_scores_stays() -> None:
    assert top_units(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3).tolist() == [True, True, False, True]
