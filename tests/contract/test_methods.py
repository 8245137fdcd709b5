"""Every file of `methods/oneshot` keeps the promises of a local method. A new file is tested from the moment it exists.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import maskgen.methods
from maskgen.core import registry
from maskgen.core.pattern import NMPattern
from maskgen.methods import LocalMethod, Solution, create

NAMES = [
    name
    for name in registry.names(maskgen.methods)
    if issubclass(registry.load(maskgen.methods, name).METHOD, LocalMethod)
]
COUPLES_ROWS = {"ria"}
"""Methods that by definition compare the rows of a column."""
PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)]
OUT_FEATURES, IN_FEATURES, TOKENS = 24, 64, 200

pytestmark = [
    pytest.mark.parametrize("name", NAMES),
    pytest.mark.parametrize("pattern", PATTERNS, ids=str),
]


def layer(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight `[O, I]` and correlated inputs `[T, I]` with very different feature scales."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator)
    mix_II = torch.randn(IN_FEATURES, IN_FEATURES, generator=generator) / IN_FEATURES**0.5
    scale_I = torch.logspace(-1, 1, IN_FEATURES)[torch.randperm(IN_FEATURES, generator=generator)]
    return weight_OI, (torch.randn(TOKENS, IN_FEATURES, generator=generator) @ mix_II + 0.1) * scale_I


def observe(method: LocalMethod, x_TI: Tensor, parts: int = 1) -> Any:
    stats = None
    for part_TI in x_TI.chunk(parts):
        stats = method.observe(stats, part_TI)
    return stats


def solve(name: str, weight_OI: Tensor, x_TI: Tensor, pattern: NMPattern, parts: int = 1) -> Solution:
    method = create(name, {})
    return method.solve(weight_OI, observe(method, x_TI, parts), pattern)


def test_is_a_frozen_method_with_defaults(name: str, pattern: NMPattern) -> None:
    method = registry.load(maskgen.methods, name).METHOD
    assert issubclass(method, LocalMethod)
    assert method.__dataclass_params__.frozen
    assert isinstance(method.needs_data, bool)
    assert method() == create(name, {field.name: field.default for field in dataclasses.fields(method)})


def test_imports_only_what_a_method_may_see(name: str, pattern: NMPattern) -> None:
    source = Path(inspect.getfile(registry.load(maskgen.methods, name).METHOD)).read_text("utf-8")
    ours = [line.split()[1] for line in source.splitlines() if line.startswith(("from maskgen", "import maskgen"))]
    assert ours and all(
        module == "maskgen.methods" or module.startswith(("maskgen.core", "maskgen.numerics")) for module in ours
    )


def test_mask_is_legal(name: str, pattern: NMPattern) -> None:
    solution = solve(name, *layer(), pattern)
    assert solution.mask.dtype == torch.bool and solution.mask.shape == (OUT_FEATURES, IN_FEATURES)
    kept_OG = solution.mask.reshape(OUT_FEATURES, -1, pattern.m).sum(-1)
    assert (kept_OG == pattern.n).all()
    if solution.weight is not None:
        assert solution.weight.dtype == torch.float32 and torch.isfinite(solution.weight).all()
        assert (solution.weight[~solution.mask] == 0).all()


def test_weights_with_one_clear_choice(name: str, pattern: NMPattern) -> None:
    """White inputs and n weights per group that dwarf the rest: no sensible method disagrees about these."""
    generator = torch.Generator().manual_seed(3)
    position_OGm = torch.rand(OUT_FEATURES, IN_FEATURES // pattern.m, pattern.m, generator=generator).argsort(-1)
    big_OI = (position_OGm < pattern.n).reshape(OUT_FEATURES, IN_FEATURES)
    weight_OI = torch.where(big_OI, 10.0, 0.01) * torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator).sign()
    solution = solve(name, weight_OI, torch.randn(4000, IN_FEATURES, generator=generator), pattern)
    assert torch.equal(solution.mask, big_OI)


def test_scaling_rows_or_inputs_does_not_change_the_mask(name: str, pattern: NMPattern) -> None:
    weight_OI, x_TI = layer()
    mask_OI = solve(name, weight_OI, x_TI, pattern).mask
    row_scale_O1 = 2.0 ** torch.arange(-8, OUT_FEATURES - 8).float()[:, None]
    if name in COUPLES_ROWS:
        row_scale_O1.fill_(0.25)
    assert torch.equal(solve(name, weight_OI * row_scale_O1, x_TI, pattern).mask, mask_OI)
    assert torch.equal(solve(name, weight_OI, x_TI * 0.125, pattern).mask, mask_OI)
    assert torch.equal(solve(name, -weight_OI, x_TI, pattern).mask, mask_OI)


def test_rows_are_independent(name: str, pattern: NMPattern) -> None:
    weight_OI, x_TI = layer()
    mask_OI = solve(name, weight_OI, x_TI, pattern).mask
    assert torch.equal(solve(name, weight_OI.flip(0), x_TI, pattern).mask.flip(0), mask_OI)
    if name not in COUPLES_ROWS:
        assert torch.equal(solve(name, weight_OI[5:6], x_TI, pattern).mask, mask_OI[5:6])


def test_same_answer_twice_and_for_any_batching(name: str, pattern: NMPattern) -> None:
    weight_OI, x_TI = layer()
    first, second = (solve(name, weight_OI, x_TI, pattern) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    assert (first.weight is None) == (second.weight is None)
    if first.weight is not None and second.weight is not None:
        assert torch.equal(first.weight, second.weight)
    assert torch.equal(solve(name, weight_OI, x_TI, pattern, parts=7).mask, first.mask)


def test_leaves_weight_inputs_and_statistics_alone(name: str, pattern: NMPattern) -> None:
    weight_OI, x_TI = layer()
    x_TI[:, 9] = 0
    before = weight_OI.clone(), x_TI.clone()
    method = create(name, {})
    stats = observe(method, x_TI)
    untouched = copy.deepcopy(stats)
    method.solve(weight_OI, stats, pattern)
    assert torch.equal(weight_OI, before[0]) and torch.equal(x_TI, before[1])
    assert same(stats, untouched)


def same(one: Any, other: Any) -> bool:
    """Whether two statistics are equal to the last bit, inside dataclasses and containers too."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
