"""Several tokens in a message where many streams run, a token in each where few do."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from sparse_serve.engine.pace import Pace


async def rounds(pace: Pace, streams: int, seconds: float) -> list[int]:
    """How often each of so many streams was let through, each of which always has something to say."""
    ends_s = time.monotonic() + seconds

    async def one() -> int:
        count = 0
        with pace.stream():
            while time.monotonic() < ends_s:
                await pace.wait()
                count += 1
                await asyncio.sleep(0)
        return count

    return await asyncio.gather(*(one() for _ in range(streams)))


@pytest.mark.parametrize(("streams", "per_s", "most"), [(64, 1000, 11), (10, 1000, 60), (400, 1000, 11)])
async def test_all_streams_together_have_a_rate(streams: int, per_s: int, most: int) -> None:
    """64 ms between messages would be too long: 50 ms is the most."""
    counts = await rounds(Pace(per_s), streams, 0.4)
    assert max(counts) <= most, "more often than the clock ticks"
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1, "one stream was let through more than another"


@pytest.mark.parametrize(("streams", "per_s"), [(3, 2000), (64, 0)])
async def test_few_streams_and_those_without_a_rate_do_not_wait(streams: int, per_s: int) -> None:
    pace = Pace(per_s)
    with contextlib.ExitStack() as running:
        for _ in range(streams):
            running.enter_context(pace.stream())
        for _ in range(1000):
            waiting = pace.wait()
            with pytest.raises(StopIteration):
                waiting.send(None)


async def test_a_stream_that_is_cancelled_takes_no_other_with_it() -> None:
    pace = Pace(100)
    with contextlib.ExitStack() as running:
        for _ in range(4):
            running.enter_context(pace.stream())
        waiting = [asyncio.create_task(pace.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        async with asyncio.timeout(5):
            done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError) and done[1:] == [None, None]
    with pace.stream():
        await asyncio.wait_for(pace.wait(), 5)
