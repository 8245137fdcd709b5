"""Wanda against its definition in plain loops, and against magnitude where the two must agree."""

from __future__ import annotations

import pytest
import torch

from maskgen.core.pattern import NMPattern
from maskgen.methods.oneshot.magnitude import Magnitude
from maskgen.methods.oneshot.wanda import Wanda


def oracle(weight: list[list[float]], inputs: list[list[float]], n: int, m: int) -> list[list[bool]]:
    """Definition, one number at a time in double precision."""
    columns = len(weight[0])
    norms = [sum(x[j] ** 2 for x in inputs) ** 0.5 for j in range(columns)]
    mask = []
    for row in weight:
        keep = [False] * columns
        for start in range(0, columns, m):
            group = range(start, start + m)
            for j in sorted(group, key=lambda j: (-abs(row[j]) * norms[j], j))[:n]:
                keep[j] = True
        mask.append(keep)
    return mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_matches_the_definition(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(12, 32, generator=generator)
    x_TI = torch.randn(50, 32, generator=generator) * torch.logspace(-2, 2, 32)[torch.randperm(32, generator=generator)]
    method = Wanda()
    stats = method.observe(method.observe(None, x_TI[:20]), x_TI[20:])
    solution = method.solve(weight_OI, stats, NMPattern(n, m))
    assert solution.mask.tolist() == oracle(weight_OI.tolist(), x_TI.tolist(), n, m)
    assert solution.weight is None
    assert not torch.equal(solution.mask, Magnitude().solve(weight_OI, None, NMPattern(n, m)).mask)


def test_equal_feature_norms_give_the_magnitude_mask() -> None:
    generator = torch.Generator().manual_seed(2)
    weight_OI = torch.randn(16, 32, generator=generator)
    x_TI = torch.randn(64, 32, generator=generator).sign()
    method, pattern = Wanda(), NMPattern(2, 4)
    mask_OI = method.solve(weight_OI, method.observe(None, x_TI), pattern).mask
    assert torch.equal(mask_OI, Magnitude().solve(weight_OI, None, pattern).mask)


def test_a_feature_that_is_never_active_is_dropped_first() -> None:
    weight_OI = torch.tensor([[100.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]])
    x_TI = torch.ones(3, 8)
    x_TI[:, 0] = 0
    method = Wanda()
    mask_OI = method.solve(weight_OI, method.observe(None, x_TI), NMPattern(3, 4)).mask
    assert mask_OI.tolist() == [[False, True, True, True, True, True, True, False]]
