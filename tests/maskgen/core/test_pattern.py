"""N:M patterns: parsing, and the project's only top-k against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskgen.core.errors import PatternError
from maskgen.core.pattern import MAX_GROUP, NMPattern

PATTERNS = [NMPattern(n, m) for n, m in ((1, 2), (2, 4), (1, 4), (3, 4), (3, 6), (4, 8), (2, 16), (63, 64))]
patterns = st.builds(lambda m, share: NMPattern(1 + share % (m - 1), m), st.integers(2, 64), st.integers(0, 1000))


def top_n_by_sorting(scores_OI: Tensor, pattern: NMPattern) -> Tensor:
    """The oracle: in each group, sort by (score descending, column ascending) and keep the first n."""
    mask = torch.zeros(scores_OI.shape, dtype=torch.bool)
    for row, scores in enumerate(scores_OI.tolist()):
        for start in range(0, len(scores), pattern.m):
            columns = sorted(range(start, start + pattern.m), key=lambda column: (-scores[column], column))
            mask[row, columns[: pattern.n]] = True
    return mask


@given(patterns)
def test_text_round_trip(pattern: NMPattern) -> None:
    assert NMPattern.parse(str(pattern)) == pattern
    assert pattern.density == pattern.n / pattern.m


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:", ":4", "2/4", "2:4 ", " 2:4", "2:4\n", "02:4", "2:04", "+2:4", "-2:4", "0:4", "4:4", "4:2", "2:65",
     "1:100", "2:4; import os", "２:４", "2.0:4", "2:4:8", "a:b", None, 24, 2.4, True, b"2:4", ["2:4"], {"n": 2}],
)  # fmt: skip
def test_parse_refuses(text: object) -> None:
    with pytest.raises(PatternError, match="pattern"):
        NMPattern.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["2:4" * 100_000, "\x1b[2J" * 1000, {"n": ["x" * 1000] * 1000}])
def test_messages_quote_strangers_briefly(text: object) -> None:
    with pytest.raises(PatternError) as caught:
        NMPattern.parse(text)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("n, m", [(0, 4), (4, 4), (5, 4), (-1, 4), (2, MAX_GROUP + 1), (True, 4), (2, 4.0), ("2", 4)])
def test_only_whole_numbers_in_bounds(n: int, m: int) -> None:
    with pytest.raises(PatternError, match="KEPT"):
        NMPattern(n, m)


@pytest.mark.parametrize("pattern, multiple", [("2:4", 8), ("1:2", 8), ("4:8", 8), ("2:16", 16), ("3:6", 24)])
def test_columns_end_with_groups_and_bytes(pattern: str, multiple: int) -> None:
    nm = NMPattern.parse(pattern)
    assert nm.column_multiple == multiple
    nm.check_columns(multiple * 3)
    assert nm.kept_columns(multiple * 3) == multiple * 3 * nm.n // nm.m
    for columns in (0, -multiple, multiple // 2, multiple + nm.m // 2):
        with pytest.raises(PatternError, match=rf"up_proj: in_features {columns} .* {multiple}"):
            nm.check_columns(columns, "up_proj")


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(1, 3), st.integers(1, 3), st.data())
def test_keeps_the_top_n_of_every_group(pattern: NMPattern, rows: int, groups: int, data: st.DataObject) -> None:
    few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf")])
    any_value = st.floats(width=32, allow_nan=False)
    shape = (rows, groups * pattern.m)
    scores = torch.from_numpy(data.draw(arrays("float32", shape, elements=few_values | any_value)))
    mask = pattern.mask_from_scores(scores)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, top_n_by_sorting(scores, pattern))
    pattern.check_mask(mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_random_scores_of_every_dtype(pattern: NMPattern, dtype: torch.dtype) -> None:
    scores = torch.randn(5, pattern.m * 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(pattern.mask_from_scores(scores), top_n_by_sorting(scores, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0, float("inf"), float("-inf")])
def test_ties_go_to_the_lower_column(pattern: NMPattern, value: float) -> None:
    mask = pattern.mask_from_scores(torch.full((2, pattern.m * 3), value))
    expected = torch.arange(pattern.m * 3) % pattern.m < pattern.n
    assert torch.equal(mask, expected.expand(2, -1))


@settings(max_examples=30, deadline=None)
@given(arrays("float32", (3, 16), elements=st.integers(-9, 9)), arrays("int32", (3, 1), elements=st.integers(-20, 20)))
def test_positive_row_scaling_changes_nothing(scores: object, exponents: object) -> None:
    scores_OI = torch.as_tensor(scores)
    scaled_OI = scores_OI * 2.0 ** torch.as_tensor(exponents)
    assert torch.equal(NMPattern(2, 4).mask_from_scores(scaled_OI), NMPattern(2, 4).mask_from_scores(scores_OI))


def test_views_that_are_not_contiguous() -> None:
    scores = torch.randn(16, 6, generator=torch.Generator().manual_seed(2)).T
    assert torch.equal(NMPattern(2, 4).mask_from_scores(scores), top_n_by_sorting(scores, NMPattern(2, 4)))


@pytest.mark.parametrize("position", [0, 3, 5, 15])
def test_nan_has_no_rank(position: int) -> None:
    scores = torch.ones(2, 8)
    scores.view(-1)[position] = float("nan")
    with pytest.raises(PatternError, match="NaN"):
        NMPattern(2, 4).mask_from_scores(scores)


@pytest.mark.parametrize("shape", [(8,), (2, 6), (2, 3, 4)])
def test_scores_of_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(PatternError, match="a multiple of 4"):
        NMPattern(2, 4).mask_from_scores(torch.ones(shape))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    mask = NMPattern(2, 4).mask_from_scores(torch.ones(shape))
    assert mask.shape == shape
    NMPattern(2, 4).check_mask(mask)


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_check_mask_names_the_first_bad_group(kept: int) -> None:
    mask = torch.tensor([True, True, False, False]).repeat(4, 3)
    mask[2, 4:8] = torch.arange(4) < kept
    mask[3, 8:] = False
    with pytest.raises(PatternError, match=rf"up: row 2, columns 4..7 keep {kept} weights, expected 2 \(2 of 12"):
        NMPattern(2, 4).check_mask(mask, "up")


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(8) > 0, torch.ones(2, 6) > 0, torch.ones(2, 2, 4) > 0])
def test_check_mask_refuses_other_tensors(mask: Tensor) -> None:
    with pytest.raises(PatternError, match="expected bool"):
        NMPattern(2, 4).check_mask(mask)


def test_candidates_have_one_fixed_order() -> None:
    """The order is part of the mask file's format and of every checkpoint of a learned mask."""
    as_text = ["".join("01"[bit] for bit in row) for row in NMPattern(2, 4).candidates().tolist()]
    assert as_text == ["1100", "1010", "1001", "0110", "0101", "0011"]
    assert NMPattern(1, 4).candidates().tolist() == torch.eye(4).bool().tolist()


@pytest.mark.parametrize("pattern", [NMPattern(n, m) for n, m in ((1, 2), (2, 4), (3, 4), (4, 8), (2, 16))], ids=str)
def test_candidates_are_every_legal_group_once(pattern: NMPattern) -> None:
    candidates = pattern.candidates()
    assert candidates.shape == (pattern.candidate_count, pattern.m) and candidates.dtype == torch.bool
    assert len(set(map(tuple, candidates.tolist()))) == pattern.candidate_count
    pattern.check_mask(candidates)
    assert candidates.tolist() == sorted(candidates.tolist(), reverse=True)


@pytest.mark.parametrize("pattern", ["8:16", "32:64"])
def test_too_many_candidates_are_refused_before_they_cost_anything(pattern: str) -> None:
    with pytest.raises(PatternError, match=rf"pattern {pattern} has \d+ candidates per group, at most 1024"):
        NMPattern.parse(pattern).candidates()
