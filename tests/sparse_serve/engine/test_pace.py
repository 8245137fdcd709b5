"""Several tokens in a message where many streams run, a token in each where few do."""

from __future__ import annotations

import asyncio
import time

import pytest

from sparse_serve.engine.pace import Pace


def running(per_s: int, streams: int) -> Pace:
    pace = Pace(per_s)
    for _ in range(streams):
        pace.begin()
    return pace


async def rounds(pace: Pace, streams: int, seconds: float) -> list[int]:
    """How often each of so many streams was let through, each of which always has something to say."""
    ends_s = time.monotonic() + seconds

    async def one() -> int:
        count = 0
        while time.monotonic() < ends_s:
            tick = asyncio.Event()
            if pace.hold(tick.set):
                await tick.wait()
            count += 1
            await asyncio.sleep(0)
        return count

    return await asyncio.gather(*(one() for _ in range(streams)))


@pytest.mark.parametrize(("streams", "per_s", "most"), [(64, 1000, 11), (10, 1000, 60), (400, 1000, 11)])
async def test_all_streams_together_have_a_rate(streams: int, per_s: int, most: int) -> None:
    """64 ms between messages would be too long: 50 ms is the most."""
    counts = await rounds(running(per_s, streams), streams, 0.4)
    assert max(counts) <= most, "more often than the clock ticks"
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1, "one stream was let through more than another"


@pytest.mark.parametrize(("streams", "per_s"), [(1, 1000), (3, 2000), (64, 0)])
async def test_few_streams_and_those_without_a_rate_are_not_held(streams: int, per_s: int) -> None:
    pace = running(per_s, streams)
    assert not any(pace.hold(lambda: None) for _ in range(1000))


async def test_those_that_have_ended_slow_nobody_down() -> None:
    pace = running(1000, 64)
    assert pace.hold(lambda: None)
    for _ in range(63):
        pace.end()
    assert not pace.hold(lambda: None)


async def test_all_that_are_held_are_let_go_at_one_tick() -> None:
    pace, released = running(1000, 10), []
    for number in range(10):
        assert pace.hold(lambda number=number: released.append((number, time.monotonic())))
    async with asyncio.timeout(10):
        while len(released) < 10:
            await asyncio.sleep(0.001)
    assert [number for number, _ in released] == list(range(10))
    assert released[-1][1] - released[0][1] < 0.01
