"""Orders of columns: never worse, each exchange the best there is, and nothing moves without a reason."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.errors import PatternError
from maskgen.core.pattern import NMPattern
from maskgen.sweep import arrange as arranger
from maskgen.sweep.arrange import arrange

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)]


def kept(score_OI: Tensor, order: Tensor, pattern: NMPattern) -> float:
    """What the mask of the reordered scores keeps, by the one function that makes masks."""
    ordered_OI = score_OI[:, order]
    return float(ordered_OI[pattern.mask_from_scores(ordered_OI)].double().sum())


@given(
    seed=st.integers(0, 10_000), groups=st.integers(1, 12), rows=st.integers(1, 9), pattern=st.sampled_from(PATTERNS)
)
def test_an_order_is_one_and_keeps_no_less(seed: int, groups: int, rows: int, pattern: NMPattern) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_OI = torch.rand(rows, groups * 8, generator=generator) ** 3 * torch.rand(groups * 8, generator=generator)
    found = arrange(score_OI, pattern)
    whole = float(score_OI.double().sum())
    assert found.order.sort().values.equal(torch.arange(groups * 8))
    assert found.after >= found.before
    assert found.before == pytest.approx(kept(score_OI, torch.arange(groups * 8), pattern) / whole)
    assert found.after == pytest.approx(kept(score_OI, found.order, pattern) / whole)


def test_strong_columns_part() -> None:
    """Four strong columns in one group: no order can keep more than all of them."""
    score_OI = torch.full((5, 16), 0.01)
    score_OI[:, 4:8] = 1.0
    found = arrange(score_OI, NMPattern(2, 4))
    assert found.before == pytest.approx((2 + 6 * 0.01) / 4.12)
    assert found.after == pytest.approx((4 + 4 * 0.01) / 4.12)


def test_columns_are_dealt_in_a_snake() -> None:
    total_I = torch.tensor([3.0, 7, 1, 5, 8, 2, 6, 4, 12, 11, 10, 9])
    dealt = total_I[arranger._interleaved(total_I[None], 4)]
    assert dealt.view(3, 4).tolist() == [[12, 7, 6, 1], [11, 8, 5, 2], [10, 9, 4, 3]]


def test_each_stage_and_a_second_pass_can_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    score_OI = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) ** 2
    score_OI *= torch.rand(128, generator=torch.Generator().manual_seed(1))
    after = []
    for passes in (0, 1, arranger.MAX_PASSES):
        monkeypatch.setattr(arranger, "MAX_PASSES", passes)
        after.append(arrange(score_OI, NMPattern(2, 4)).after)
    assert arrange(score_OI, NMPattern(2, 4)).before < after[0] < after[1] < after[2]


def test_chunks_exchange_among_themselves_and_lose_little(monkeypatch: pytest.MonkeyPatch) -> None:
    score_OI = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) ** 2
    whole = arrange(score_OI, NMPattern(2, 4))
    monkeypatch.setattr(arranger, "GROUPS_PER_CHUNK", 12)
    parts = arrange(score_OI, NMPattern(2, 4))
    assert parts.order.sort().values.equal(torch.arange(128))
    assert whole.before < parts.after and parts.after - whole.before > 0.7 * (whole.after - whole.before)


@pytest.mark.parametrize("size", [1e-38, 1e38])
def test_scores_of_any_size(size: float) -> None:
    score_OI = torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    assert arrange(score_OI * size, NMPattern(2, 4)).after == pytest.approx(arrange(score_OI, NMPattern(2, 4)).after)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("position", [0, 3])
def test_an_exchange_is_the_best_of_all(pattern: NMPattern, position: int) -> None:
    score_OI = torch.rand(7, 4 * pattern.m, generator=torch.Generator().manual_seed(position)) ** 2
    order_GM = torch.randperm(4 * pattern.m, generator=torch.Generator().manual_seed(1)).view(4, -1)
    every = []
    for columns in itertools.permutations(order_GM[:, position].tolist()):
        tried_GM = order_GM.clone()
        tried_GM[:, position] = torch.tensor(columns)
        every.append(kept(score_OI, tried_GM.reshape(-1), pattern))
    assert len(set(every)) > 1, "every exchange is as good: the test would not notice"
    found_I = arranger._assign(score_OI, order_GM.reshape(-1), position, pattern)
    assert kept(score_OI, found_I, pattern) == pytest.approx(max(every))


def test_nothing_moves_without_gain() -> None:
    for score_OI in (torch.ones(3, 16), torch.zeros(3, 16)):
        assert arrange(score_OI, NMPattern(2, 4)).order.equal(torch.arange(16))


def test_columns_that_do_not_fall_into_groups() -> None:
    with pytest.raises(PatternError, match="18"):
        arrange(torch.ones(2, 18), NMPattern(2, 4))
