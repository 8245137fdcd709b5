"""Every file of `methods/correction` keeps the promises of such a method. A new file is tested as soon as it exists.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import maskgen.methods
from maskgen.core import registry
from maskgen.methods import create
from maskgen.methods.correction import CorrectionMethod

METHODS = {name: registry.load(maskgen.methods, name).METHOD for name in registry.names(maskgen.methods)}
NAMES = [name for name, method in METHODS.items() if issubclass(method, CorrectionMethod)]
OUT_FEATURES, IN_FEATURES = 48, 64

pytestmark = pytest.mark.parametrize("name", NAMES)


def method_of(name: str) -> CorrectionMethod:
    method = create(name, {})
    assert isinstance(method, CorrectionMethod)
    return method


def layer() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale_I = torch.logspace(-1, 1, IN_FEATURES)
    return (
        torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator),
        torch.randn(200, IN_FEATURES, generator=generator) * scale_I,
    )


def observe(method: CorrectionMethod, x_TI: Tensor, parts: int = 1) -> Any:
    stats = None
    for part_TI in x_TI.chunk(parts):
        stats = method.observe(stats, part_TI)
    return stats


def test_is_a_frozen_method_with_defaults(name: str) -> None:
    method = METHODS[name]
    assert method.__dataclass_params__.frozen and method().uses_prior
    assert method() == create(name, {field.name: field.default for field in dataclasses.fields(method)})


def test_imports_only_what_a_method_may_see(name: str) -> None:
    source = Path(inspect.getfile(METHODS[name])).read_text("utf-8")
    ours = [line.split()[1] for line in source.splitlines() if line.startswith(("from maskgen", "import maskgen"))]
    rooms = ("maskgen.core", "maskgen.numerics", "maskgen.methods.correction")
    assert ours and all(module == "maskgen.methods" or module.startswith(rooms) for module in ours)


def test_makes_what_its_form_says(name: str) -> None:
    method, (error_OI, x_TI) = method_of(name), layer()
    found = method.solve(error_OI, torch.zeros_like(error_OI), observe(method, x_TI))
    pool = None if found.pool is None else list(found.pool.shape)
    assert (list(found.out.shape), pool) == method.correction.shapes(OUT_FEATURES, IN_FEATURES, "layer")
    assert found.is_finite and found.out.dtype == torch.float32
    left = (error_OI - found.dense(IN_FEATURES)) @ x_TI.T
    assert left.norm() < 0.9 * (error_OI @ x_TI.T).norm()


def test_same_answer_twice_and_for_any_batching(name: str) -> None:
    method, (error_OI, x_TI) = method_of(name), layer()
    first, second, third = (
        method.solve(error_OI, torch.zeros_like(error_OI), observe(method, x_TI, parts)) for parts in (1, 1, 7)
    )
    assert torch.equal(first.dense(IN_FEATURES), second.dense(IN_FEATURES))
    torch.testing.assert_close(first.dense(IN_FEATURES), third.dense(IN_FEATURES), rtol=1e-3, atol=1e-3)


def test_leaves_its_arguments_alone(name: str) -> None:
    method, (error_OI, x_TI) = method_of(name), layer()
    before = error_OI.clone(), x_TI.clone()
    stats, served_OI = observe(method, x_TI), torch.zeros_like(error_OI)
    first = method.solve(error_OI, served_OI, stats)
    assert torch.equal(error_OI, before[0]) and torch.equal(x_TI, before[1])
    assert torch.equal(method.solve(error_OI, served_OI, stats).out, first.out), "the statistics are as they were"
