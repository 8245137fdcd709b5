"""A kernel that rounds is right, one that is wrong anywhere is found and located."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import LinearSpec, reference, supported
from sparse_serve.runtime import environment
from sparse_serve.tuning import parity_file
from sparse_serve.tuning.dispatch import Bound, Plan
from sparse_serve.tuning.parity import compare
from sparse_serve.tuning.parity_file import KernelParity
from sparse_serve.tuning.samples import random_weight
from sparse_serve.tuning.selection import BUCKETS, Choice

Change = Callable[[Tensor, Tensor], Tensor]
"""From x `[T, I]` and the right y `[T, O]` to another one."""


def spec_of(
    dtype: torch.dtype = torch.bfloat16, values: str = "float", outputs: int = 96, activations: str = "float"
) -> LinearSpec:
    return LinearSpec(outputs, 512, NMPattern(2, 4), dtype, "cpu", values, activations=activations)


def measured(spec: LinearSpec, change: Change, bias: Tensor | None = None) -> list[KernelParity]:
    """Of the reference kernel, with `change` made to what it answers."""
    packed = random_weight(spec)

    def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        return change(x_TI, reference.linear(x_TI, tensors, bias_O))

    kernel: Any = SimpleNamespace(linear=linear)
    choice = Choice(spec, Plan.of("reference"))
    return compare("layer", choice, Bound("*=reference", kernel), choice.plan.prepare(packed), packed, bias)


@pytest.mark.parametrize("name", ["reference", "cpu", "cpu_int8"])
@pytest.mark.parametrize("values", ["float", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_is_right_up_to_rounding(name: str, values: str, dtype: torch.dtype) -> None:
    spec = spec_of(dtype, values, activations="int8")
    kernels, refused = supported(spec)
    if name not in kernels:
        pytest.skip(refused[name])
    packed, choice = random_weight(spec), Choice(spec, Plan.of(name))
    bias = torch.linspace(-3, 3, spec.out_features, dtype=dtype)
    for bias_O in (None, bias):
        found = compare("layer", choice, choice.plan.bind(), choice.plan.prepare(packed), packed, bias_O)
        assert [one.tokens for one in found] == list(BUCKETS)
        assert [one.first_tokens for one in found] == [1, *(tokens + 1 for tokens in BUCKETS[:-1])]
        assert all(0 <= one.ratio < 1 and one.rows is None and one.kernel == name for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", ["float", "int8"])
def test_one_wrong_tile_is_found_at_its_rows_and_columns(dtype: torch.dtype, values: str) -> None:
    """A tile of 16 rows by 128 columns is left out of the product."""
    spec = spec_of(dtype, values)
    tile_OI = random_weight(spec).unpack()[32:48, 128:256].to(dtype)

    def without_the_tile(x_TI: Tensor, y_TO: Tensor) -> Tensor:
        y_TO = y_TO.clone()
        y_TO[:, 32:48] -= (x_TI[:, 128:256].float() @ tile_OI.float().T).to(dtype)
        return y_TO

    for one in measured(spec, without_the_tile):
        assert one.ratio > 3
        assert one.columns == (128, 255)
        low, high = one.rows or (0, 0)
        assert 32 <= low <= high <= 47
        assert one.at_tokens < 16 or (low, high) == (32, 47), "with many tokens all rows show it"


def test_what_is_wrong_with_some_numbers_of_tokens_is_found_there_only() -> None:
    """The last token's eighth output: by the same amount, and by a product with every input."""

    def added(x_TI: Tensor, y_TO: Tensor) -> Tensor:
        if 5 <= len(x_TI) <= 16:
            y_TO = y_TO.clone()
            y_TO[-1, 7] += 1.0
        return y_TO

    def doubled(x_TI: Tensor, y_TO: Tensor) -> Tensor:
        if 5 <= len(x_TI) <= 16:
            y_TO = y_TO.clone()
            y_TO[-1, 7] *= 2.0
        return y_TO

    for change, columns in ((added, None), (doubled, (0, 511))):
        wrong = [one for one in measured(spec_of(), change) if one.ratio > 1]
        assert [(one.bucket, one.rows, one.columns) for one in wrong] == [("5 to 16 tokens", (7, 7), columns)]


def test_a_wrong_bias_is_not_blamed_on_columns() -> None:
    """The probes have no bias."""
    spec = spec_of(torch.float32)
    bias = torch.zeros(spec.out_features)

    def forgets(x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return y_TO - bias

    bias[5] = 0.25
    found = measured(spec, lambda x_TI, y_TO: y_TO, bias)
    assert all(one.ratio < 1 for one in found)
    kernel: Any = SimpleNamespace(linear=lambda x_TI, tensors, bias_O: reference.linear(x_TI, tensors, None))
    packed, choice = random_weight(spec), Choice(spec, Plan.of("reference"))
    found = compare("layer", choice, Bound("*=reference", kernel), choice.plan.prepare(packed), packed, bias)
    assert all((one.rows, one.columns) == ((5, 5), None) for one in found)


def test_nan_is_wrong() -> None:
    found = measured(spec_of(), lambda x_TI, y_TO: y_TO * torch.nan)
    assert all(one.error == float("inf") and one.rows == (0, 95) for one in found)


def test_a_single_wrong_weight_shows() -> None:
    """One kept weight of 49,152 is taken for its neighbour's."""
    spec = spec_of()
    weight_OI = random_weight(spec).unpack()
    column = int(weight_OI[3].float().abs().argmax())

    def swapped(x_TI: Tensor, y_TO: Tensor) -> Tensor:
        y_TO = y_TO.clone()
        y_TO[:, 3] -= (x_TI[:, column].float() * weight_OI[3, column].float()).to(y_TO.dtype)
        return y_TO

    worst = max(measured(spec, swapped), key=lambda one: one.ratio)
    assert worst.ratio > 1 and worst.rows == (3, 3) and worst.columns is not None
    assert worst.columns[0] <= column <= worst.columns[1]


def test_findings_go_through_files(tmp_path: Path) -> None:
    found = [
        KernelParity("a", "cpu", 1, 1, 1, 0.5, 0.25, (0, 15), (16, 31)),
        KernelParity("b", "cpu", 2, 4, 4, float("inf"), 0.25, (0, 15), None),
    ]
    assert environment.kernel_parity_folder() is None
    with environment.kernel_parity(tmp_path):
        parity_file.write(found[:1])
        parity_file.write(found[1:])
    assert environment.kernel_parity_folder() is None
    assert parity_file.read(tmp_path) == found
    assert (found[0].ratio, found[0].bucket, found[1].bucket) == (2.0, "1 token", "2 to 4 tokens")
