"""Windows by protocol: counted by hand, and as properties over any text length."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgen.core.errors import DataError
from maskgen.core.perplexity import Perplexity, Protocol, Window, digest_windows

BOS = -1


def scored(windows: list[Window]) -> list[int]:
    return [token for window in windows for token in window.ids[window.first_scored :]]


def test_non_overlapping_by_hand() -> None:
    windows = Protocol(window_tokens=4).windows(list(range(11)))
    assert windows == [Window([0, 1, 2, 3], 1), Window([4, 5, 6, 7], 1)]


def test_bos_takes_a_place_of_the_window_and_the_first_text_token_counts() -> None:
    windows = Protocol(window_tokens=4, bos=True).windows(list(range(7)), [BOS])
    assert windows == [Window([BOS, 0, 1, 2], 1), Window([BOS, 3, 4, 5], 1)]
    assert Protocol(4, bos=False).windows(list(range(7)), [BOS]) == Protocol(4).windows(list(range(7)))


def test_bos_and_a_stride_by_hand() -> None:
    windows = Protocol(window_tokens=5, stride_tokens=2, bos=True).windows(list(range(8)), [BOS])
    assert windows == [Window([BOS, 0, 1, 2, 3], 1), Window([BOS, 2, 3, 4, 5], 3), Window([BOS, 4, 5, 6, 7], 3)]
    assert scored(windows) == list(range(8))


def test_several_tokens_in_front_are_not_scored() -> None:
    windows = Protocol(window_tokens=5, bos=True).windows(list(range(6)), [-2, BOS])
    assert windows == [Window([-2, BOS, 0, 1, 2], 2), Window([-2, BOS, 3, 4, 5], 2)]
    with pytest.raises(DataError, match="window 2: no room for text after BOS"):
        Protocol(2, bos=True).windows(list(range(6)), [-2, BOS])


def test_stride_by_hand() -> None:
    windows = Protocol(window_tokens=4, stride_tokens=1).windows(list(range(6)))
    assert windows == [Window([0, 1, 2, 3], 1), Window([1, 2, 3, 4], 3), Window([2, 3, 4, 5], 3)]


def test_one_exact_window() -> None:
    assert Protocol(window_tokens=4).windows([5, 6, 7, 8]) == [Window([5, 6, 7, 8], 1)]
    assert Protocol(window_tokens=4, bos=True).windows([5, 6, 7], [0]) == [Window([0, 5, 6, 7], 1)]


def test_max_windows_takes_the_first() -> None:
    ids = list(range(100))
    assert Protocol(10, max_windows=3).windows(ids) == Protocol(10).windows(ids)[:3]
    assert Protocol(10, max_windows=99).windows(ids) == Protocol(10).windows(ids)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 100))
def test_every_token_is_scored_at_most_once_and_in_order(window: int, stride: int, length: int) -> None:
    protocol = Protocol(window, min(stride, window))
    ids = list(range(length))
    if length < window:
        with pytest.raises(DataError, match=f"text of {length} tokens: shorter than one window of {window}"):
            protocol.windows(ids)
        return
    windows = protocol.windows(ids)
    assert all(len(one.ids) == window and 1 <= one.first_scored < window for one in windows)
    tokens = scored(windows)
    assert tokens == sorted(set(tokens))
    last = windows[-1].ids[-1]
    assert length - last <= protocol.stride
    skipped = len(windows) if protocol.stride == window else 1
    assert len(tokens) == last + 1 - skipped


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.integers(20, 100))
def test_with_bos_no_token_is_left_out(window: int, stride: int, length: int) -> None:
    windows = Protocol(window, min(stride, window), bos=True).windows(list(range(length)), [BOS])
    tokens = scored(windows)
    assert tokens == list(range(len(tokens)))
    assert length - len(tokens) < window
    assert all(len(one.ids) == window and one.ids[0] == BOS for one in windows)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window_tokens": 1}, "window 1: expected at least 2"),
        ({"window_tokens": 8, "stride_tokens": 0}, "stride 0: expected 1 to 8"),
        ({"window_tokens": 8, "stride_tokens": 9}, "stride 9: expected 1 to 8"),
        ({"window_tokens": 8, "stride_tokens": -1}, "stride -1"),
        ({"max_windows": 0}, "max_windows 0"),
    ],
)
def test_protocols_that_mean_nothing(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Protocol(**options)


def test_bos_needs_a_bos_token() -> None:
    with pytest.raises(DataError, match="no beginning-of-sequence token"):
        Protocol(4, bos=True).windows(list(range(9)))


def test_a_stride_of_the_window_is_the_default() -> None:
    ids = list(range(50))
    assert Protocol(8, 8).windows(ids) == Protocol(8).windows(ids)
    assert Protocol(8, 8, bos=True).windows(ids, [BOS]) == Protocol(8, bos=True).windows(ids, [BOS])


def test_describe() -> None:
    assert Protocol().describe() == "window 2048, non-overlapping, no BOS, all windows"
    assert Protocol(64, 32, max_windows=5).describe() == "window 64, stride 32, no BOS, first 5 windows"
    assert Protocol(64, bos=True).describe() == "window 64, non-overlapping, BOS in each, all windows"
    said = {
        (bos, own): Protocol(64, bos=bos, own_bos=own).describe().split(", ")[2] for bos in (0, 1) for own in (0, 1)
    }
    assert said[0, 0] == "no BOS (as the tokenizer does by itself)"
    assert said[1, 1] == "BOS in each (as the tokenizer does by itself)"
    assert said[0, 1] == "no BOS (the tokenizer puts one there by itself)"
    assert said[1, 0] == "BOS in each (the tokenizer puts none there by itself)"


def test_value_is_the_exponential_of_the_mean_over_windows() -> None:
    result = Perplexity(Protocol(4), [1.0, 2.0, 6.0], [3, 3, 3], "sha256:" + "0" * 64)
    assert result.value == pytest.approx(math.exp(3.0))
    again = json.loads(json.dumps(result.to_dict()))
    assert again["perplexity"] == result.value
    assert Protocol(**again["protocol"]) == Protocol(4)
    assert again["nll_per_window"] == [1.0, 2.0, 6.0]


def test_digest_of_windows_sees_tokens_cuts_and_what_is_scored() -> None:
    windows = [Window([1, 2, 3, 4], 1), Window([5, 6], 1)]
    others = [
        [Window([1, 2, 3, 5], 1), Window([5, 6], 1)],
        [Window([1, 2, 3], 1), Window([4, 5, 6], 1)],
        [Window([1, 2, 3, 4], 2), Window([5, 6], 1)],
        [Window([5, 6], 1), Window([1, 2, 3, 4], 1)],
        [Window([1, 2, 3, 4, 5, 6], 1)],
    ]
    assert len({digest_windows(one) for one in [windows, *others]}) == 6
    assert digest_windows(windows) == digest_windows(list(windows))
