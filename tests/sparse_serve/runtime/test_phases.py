"""Phases of a start."""

import time

import pytest

from sparse_serve.runtime.phases import Phases


def test_phases_add_up_to_the_time_that_passed() -> None:
    before_s = time.monotonic()
    phases = Phases()
    begun_s = time.monotonic()
    time.sleep(0.02)
    middle_s = time.monotonic()
    time.sleep(0.01)
    phases.end("a", middle_s)
    ending_s = time.monotonic()
    phases.end("b")
    ended_s = time.monotonic()
    assert list(phases.seconds) == ["a", "b"]
    thousandth_s = 0.001  # to which they are rounded
    assert middle_s - begun_s - thousandth_s <= phases.seconds["a"] <= middle_s - before_s + thousandth_s
    assert ending_s - begun_s - thousandth_s <= sum(phases.seconds.values()) <= ended_s - before_s + thousandth_s


@pytest.mark.parametrize("at_s", [0.0, 1e12])
def test_a_time_out_of_order_makes_no_phase_negative(at_s: float) -> None:
    phases = Phases()
    phases.end("a")
    phases.end("b", at_s)
    phases.end("c")
    assert all(0 <= seconds < 5 for seconds in phases.seconds.values())
