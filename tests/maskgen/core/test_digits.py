"""Patterns as digits: the order is the format, sizes are what is promised, and what no writer writes is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.digits import digits_per_byte, pack_digits, unpack_digits
from maskgen.core.errors import FormatError, PatternError
from maskgen.core.pattern import NMPattern
from tests.directories import TWO_FOUR

DIGITS = [
    NMPattern(n, m) for n, m in ((1, 2), (2, 4), (1, 4), (3, 4), (1, 3), (2, 5), (4, 6), (1, 8), (2, 16), (1, 64))
]
BITS = [NMPattern(n, m) for n, m in ((4, 8), (2, 8), (3, 6), (8, 16), (31, 64))]
ORDER = ["1100", "1010", "1001", "0110", "0101", "0011"]


def mask_of(pattern: NMPattern, rows: int, groups: int, seed: int = 0) -> Tensor:
    scores = torch.rand(rows, groups * pattern.m, generator=torch.Generator().manual_seed(seed))
    return pattern.mask_from_scores(scores)


def by_hand(mask_OI: Tensor, pattern: NMPattern) -> list[int]:
    """The documented recipe, one group at a time: look the group up, then Horner from the last digit of a byte."""
    legal = [tuple(group) for group in pattern.candidates().tolist()]
    digits = [legal.index(tuple(group)) for group in mask_OI.reshape(-1, pattern.m).tolist()]
    packed = []
    for start in range(0, len(digits), digits_per_byte(pattern)):
        value = 0
        for digit in reversed(digits[start : start + digits_per_byte(pattern)]):
            value = value * len(legal) + digit
        packed.append(value)
    return packed


@pytest.mark.parametrize(
    "pattern, count",
    [("2:4", 3), ("1:4", 4), ("3:4", 4), ("1:2", 8), ("1:8", 2), ("2:16", 1), ("1:64", 1), ("4:8", 0), ("2:8", 0),
     ("3:6", 0), ("8:16", 0), ("32:64", 0)],
)  # fmt: skip
def test_groups_per_byte(pattern: str, count: int) -> None:
    nm = NMPattern.parse(pattern)
    assert digits_per_byte(nm) == count
    if count:
        assert nm.candidate_count**count <= 256 < nm.candidate_count ** (count + 1)
        assert count * nm.m > 8


def test_digits_are_the_fixed_order_and_the_first_is_the_least_significant() -> None:
    for digit, text in enumerate(ORDER):
        mask = torch.tensor([[c == "1" for c in text] + [True, True, False, False] * 3])
        assert pack_digits(mask, TWO_FOUR).tolist() == [digit, 0]
        assert pack_digits(mask.roll(4), TWO_FOUR).tolist() == [6 * digit, 0]
        assert pack_digits(mask.roll(8), TWO_FOUR).tolist() == [36 * digit, 0]
        assert pack_digits(mask.roll(12), TWO_FOUR).tolist() == [0, digit]
    assert pack_digits(torch.tensor([[False, False, True, True] * 6]), TWO_FOUR).tolist() == [215, 215]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DIGITS), st.integers(1, 9), st.integers(1, 9), st.integers(0))
def test_round_trip_and_size(pattern: NMPattern, rows: int, groups: int, seed: int) -> None:
    mask = mask_of(pattern, rows, groups, seed % 2**60)
    packed = pack_digits(mask, pattern)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(rows * groups / digits_per_byte(pattern)),)
    assert packed.tolist() == by_hand(mask, pattern)
    assert torch.equal(unpack_digits(packed, (rows, groups * pattern.m), pattern, "q"), mask)


@pytest.mark.parametrize("pattern", DIGITS, ids=str)
def test_every_candidate_survives(pattern: NMPattern) -> None:
    mask = pattern.candidates().reshape(1, -1)
    assert torch.equal(unpack_digits(pack_digits(mask, pattern), (1, mask.shape[1]), pattern, "q"), mask)


def test_views_that_are_not_contiguous() -> None:
    mask = mask_of(TWO_FOUR, 6, 5)
    assert torch.equal(pack_digits(mask.T.contiguous().T, TWO_FOUR), pack_digits(mask, TWO_FOUR))
    assert torch.equal(pack_digits(mask[::2], TWO_FOUR), pack_digits(mask[::2].clone(), TWO_FOUR))


def test_a_mask_that_breaks_the_pattern_has_no_digits() -> None:
    mask = mask_of(TWO_FOUR, 3, 4)
    mask[1, 4:8] = True
    with pytest.raises(PatternError, match=r"row 1, columns 4\.\.7 keep 4"):
        pack_digits(mask, TWO_FOUR)


@pytest.mark.parametrize("byte", range(216, 256))
def test_bytes_that_are_no_three_digits(byte: int) -> None:
    packed = pack_digits(mask_of(TWO_FOUR, 6, 4), TWO_FOUR)
    packed[3] = byte
    with pytest.raises(FormatError, match=rf"q: a byte of {byte}, but 3 digits of base 6 end at 215"):
        unpack_digits(packed, (6, 16), TWO_FOUR, "q")


@pytest.mark.parametrize("groups, end", [(4, 5), (5, 35)])
def test_digits_left_over_must_be_zero(groups: int, end: int) -> None:
    for last in range(256):
        packed = torch.tensor([7, last], dtype=torch.uint8)
        if last <= end:
            TWO_FOUR.check_mask(unpack_digits(packed, (1, groups * 4), TWO_FOUR, "q"))
        else:
            with pytest.raises(FormatError, match=rf"q: a (last )?byte of {last}, but [123] digits of base 6 end at"):
                unpack_digits(packed, (1, groups * 4), TWO_FOUR, "q")


@pytest.mark.parametrize("size", [0, 1, 3, 100])
def test_wrong_size(size: int) -> None:
    with pytest.raises(
        FormatError, match=rf"q: {size} bytes of digits for a 2:4 mask \[1, 16\], expected 2 \(3 groups"
    ):
        unpack_digits(torch.zeros(size, dtype=torch.uint8), (1, 16), TWO_FOUR, "q")


@pytest.mark.parametrize("pattern", BITS, ids=str)
def test_where_bits_are_as_small_digits_are_not_used(pattern: NMPattern) -> None:
    assert digits_per_byte(pattern) == 0
