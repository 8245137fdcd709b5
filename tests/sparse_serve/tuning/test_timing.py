"""Turns, copies and ratios."""

from __future__ import annotations

import pytest
import torch

from sparse_serve.tuning.timing import Call, Times, interleaved, torch_threads, wall_s


def test_candidates_take_turns_and_use_their_copies_in_turn() -> None:
    ran: list[str] = []
    calls = {name: [lambda word=f"{name}{copy}": ran.append(word) for copy in range(2)] for name in "ab"}
    times = interleaved(calls, budget_s=60.0, least=4, most=4)
    assert ran == ["a0", "a1", "b0", "b1", "a0", "b0", "b1", "a1", "a0", "b0", "b1", "a1"]
    assert [len(seconds) for seconds in times.seconds.values()] == [4, 4]


def test_the_budget_ends_it_but_not_before_enough_rounds() -> None:
    assert len(interleaved({"a": [lambda: None]}, budget_s=60.0, least=1, most=7).seconds["a"]) == 7
    assert len(interleaved({"a": [lambda: None]}, budget_s=0.0, least=3).seconds["a"]) == 3


def test_slow_copies_are_not_all_run_before() -> None:
    """Sixteen layers of 0.2 s in turn would make a first start wait."""
    ran: list[str] = []
    calls = {name: [lambda word=f"{name}{copy}": ran.append(word) for copy in range(9)] for name in "ab"}
    interleaved(calls, budget_s=0.0, least=1)
    assert ran == ["a0", "b0", "a0", "b0"]


def test_a_clock_of_one_s_own_is_used_for_every_round() -> None:
    ran: list[str] = []

    def clock(call: Call) -> float:
        call()
        return 2.0

    times = interleaved({"a": [lambda: ran.append("a")]}, budget_s=0.0, least=3, clock=clock)
    assert times.seconds["a"] == [2.0, 2.0, 2.0] and len(ran) == 4, "a warm-up, which is not timed"
    assert 0 <= wall_s(lambda: None) < 1


def test_a_speedup_is_the_median_over_rounds_against_the_faster_peer() -> None:
    times = Times({"kernel": [1.0, 1.0, 2.0], "slow": [9.0, 2.0, 9.0], "fast": [3.0, 4.0, 4.0]})
    assert times.speedup("kernel", ["slow", "fast"]) == 2.0
    assert times.speedup("kernel", ["fast"]) == 3.0
    assert times.median_s("kernel") == pytest.approx(1.0)


def test_torchs_threads_are_set_inside_and_come_back_even_after_an_error() -> None:
    before = torch.get_num_threads()
    with torch_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
