"""RIA against its definition in plain loops, and what scaling may and may not change."""

from __future__ import annotations

import pytest
import torch

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.oneshot.ria import RIA
from maskgen.methods.oneshot.wanda import Wanda

PATTERN = NMPattern(2, 4)


def oracle(weight: list[list[float]], inputs: list[list[float]], exponent: float, n: int, m: int) -> list[list[bool]]:
    """Definition, one number at a time in double precision."""
    columns = range(len(weight[0]))
    norms = [sum(x[j] ** 2 for x in inputs) ** 0.5 for j in columns]
    down = [sum(abs(row[j]) for row in weight) for j in columns]
    mask = []
    for row in weight:
        across = sum(abs(w) for w in row)
        score = [(abs(row[j]) / across + abs(row[j]) / down[j]) * norms[j] ** exponent for j in columns]
        keep = [False] * len(row)
        for start in range(0, len(row), m):
            for j in sorted(range(start, start + m), key=lambda j, score=score: (-score[j], j))[:n]:  # type: ignore[misc]
                keep[j] = True
        mask.append(keep)
    return mask


def layer(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(12, 32, generator=generator)
    spread_I = torch.logspace(-2, 2, 32)[torch.randperm(32, generator=generator)]
    return weight_OI, torch.randn(50, 32, generator=generator) * spread_I


@pytest.mark.parametrize("exponent", [0.5, 0.0, 1.0])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_matches_the_definition(n: int, m: int, exponent: float) -> None:
    weight_OI, x_TI = layer()
    method = RIA(exponent=exponent)
    stats = method.observe(method.observe(None, x_TI[:20]), x_TI[20:])
    solution = method.solve(weight_OI, stats, NMPattern(n, m))
    assert solution.mask.tolist() == oracle(weight_OI.tolist(), x_TI.tolist(), exponent, n, m)
    assert solution.weight is None
    assert not torch.equal(solution.mask, Wanda().solve(weight_OI, stats, NMPattern(n, m)).mask)


def test_a_weak_column_is_not_emptied() -> None:
    """Wanda drops a column of small weights everywhere; relative to its column the weight that stands out stays."""
    weight_OI = torch.ones(8, 8)
    weight_OI[:, 3] = 0.01
    weight_OI[2, 3] = 0.9
    stats = torch.ones(8)
    assert not Wanda().solve(weight_OI, stats, PATTERN).mask[:, 3].any()
    assert RIA().solve(weight_OI, stats, PATTERN).mask[:, 3].tolist() == [row == 2 for row in range(8)]


def test_one_factor_on_everything_changes_nothing_and_one_on_a_row_may() -> None:
    weight_OI, x_TI = layer()
    method = RIA()
    stats = method.observe(None, x_TI)
    mask_OI = method.solve(weight_OI, stats, PATTERN).mask
    assert torch.equal(method.solve(-64 * weight_OI, stats / 1024, PATTERN).mask, mask_OI)
    louder_OI = weight_OI * torch.linspace(0.1, 10, 12)[:, None]
    assert not torch.equal(method.solve(louder_OI, stats, PATTERN).mask, mask_OI)


def test_rows_columns_and_features_of_zeros() -> None:
    weight_OI, x_TI = layer()
    weight_OI[3], weight_OI[:, 6], x_TI[:, 9] = 0, 0, 0
    method = RIA()
    mask_OI = method.solve(weight_OI, method.observe(None, x_TI), PATTERN).mask
    PATTERN.check_mask(mask_OI)
    others = [row for row in range(12) if row != 3]
    assert not mask_OI[others][:, [6, 9]].any()


@pytest.mark.parametrize("exponent", [-0.1, float("nan"), float("inf")])
def test_the_exponent_must_be_a_power(exponent: float) -> None:
    with pytest.raises(RecipeError, match=r"method\.exponent"):
        RIA(exponent=exponent)
