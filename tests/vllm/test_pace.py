"""vLLM's own outputs, joined between two messages of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from sparse_serve.engine import Sampling
from sparse_serve.engine.pace import Pace
from sparse_serve.engine.vllm_values import Outputs


class Clock(Pace):
    """Holds whoever asks until it is told to tick."""

    def __init__(self) -> None:
        super().__init__(1)
        self.held: list[Any] = []

    def hold(self, release: Any) -> bool:
        self.held.append(release)
        return True

    def tick(self) -> None:
        held, self.held = self.held, []
        for release in held:
            release()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def collector_of(pace: Pace, kind: str = "DELTA") -> Any:
    from vllm.sampling_params import RequestOutputKind

    from sparse_serve.engine.vllm_pace import PacedCollector

    return PacedCollector(pace, RequestOutputKind[kind], "one")


@pytest.fixture
def collector(clock: Clock) -> Any:
    return collector_of(clock)


def output(*tokens: int, index: int = 0, reason: str | None = None, finished: bool | None = None) -> Any:
    """Of one step: tokens, their text (a digit each) and log-probabilities."""
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    logprobs = [{token: Logprob(-token / 8, 1)} for token in tokens]
    made = CompletionOutput(index, "".join(map(str, tokens)), list(tokens), None, logprobs, finish_reason=reason)
    is_last = reason is not None if finished is None else finished
    return RequestOutput("one", None, [1, 2], None, [made], finished=is_last)


def told(outputs: Iterable[Any]) -> list[tuple[int, str, tuple[int, ...], list[float], int]]:
    """What a client is told: sequence, text, tokens, log-probabilities, tokens so far."""
    found = Outputs(Sampling(logprobs=0))
    return [
        (
            chunk.index,
            chunk.text,
            chunk.token_ids,
            [one.token.logprob for one in chunk.logprobs],
            chunk.completion_tokens,
        )
        for made in outputs
        for chunk in found.chunks(made)
    ]


async def test_the_first_goes_at_once_and_what_follows_waits_for_the_tick(clock: Clock, collector: Any) -> None:
    collector.put(output(1))
    taken = [await asyncio.wait_for(collector.get(), 5)]
    for token in (2, 3):
        collector.put(output(token))
    assert collector.get_nowait() is None
    waiting = asyncio.create_task(collector.get())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    clock.tick()
    taken.append(await asyncio.wait_for(waiting, 5))
    assert told(taken) == [(0, "1", (1,), [-0.125], 1), (0, "23", (2, 3), [-0.25, -0.375], 3)]


async def test_a_token_that_comes_after_the_tick_waits_no_more(clock: Clock, collector: Any) -> None:
    collector.put(output(1))
    await collector.get()
    clock.tick()
    waiting = asyncio.create_task(collector.get())
    await asyncio.sleep(0)
    collector.put(output(2))
    assert (await asyncio.wait_for(waiting, 5)).outputs[0].token_ids == [2]


@pytest.mark.parametrize("waits", [True, False])
async def test_the_end_does_not_wait(collector: Any, waits: bool) -> None:
    collector.put(output(1))
    await collector.get()
    waiting = asyncio.create_task(collector.get())
    if waits:
        await asyncio.sleep(0)
    collector.put(output(2))
    collector.put(output(3, reason="length"))
    last = await asyncio.wait_for(waiting, 5)
    assert last.finished and last.outputs[0].token_ids == [2, 3] and last.outputs[0].finish_reason == "length"


async def test_an_error_comes_at_once_and_after_what_was_made_before_it(collector: Any) -> None:
    collector.put(output(1))
    await collector.get()
    collector.put(output(2))
    collector.put(ValueError("the engine is gone"))
    assert (await asyncio.wait_for(collector.get(), 5)).outputs[0].token_ids == [2]
    with pytest.raises(ValueError, match="gone"):
        await asyncio.wait_for(collector.get(), 5)


async def test_an_error_comes_where_nothing_is_kept(collector: Any) -> None:
    collector.put(output(1))
    await collector.get()
    waiting = asyncio.create_task(collector.get())
    await asyncio.sleep(0)
    collector.put(ValueError("the engine is gone"))
    with pytest.raises(ValueError, match="gone"):
        await asyncio.wait_for(waiting, 5)


async def test_a_request_that_is_cancelled_while_it_is_held_takes_no_other_with_it(clock: Clock) -> None:
    one, other = collector_of(clock), collector_of(clock)
    for collector in (one, other):
        collector.put(output(1))
        await collector.get()
        collector.put(output(2))
    waiting = [asyncio.create_task(collector.get()) for collector in (one, other)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    one.close()
    clock.tick()
    async with asyncio.timeout(5):
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(ended[0], asyncio.CancelledError) and ended[1].outputs[0].token_ids == [2]


async def test_sequences_of_a_request_are_kept_apart(clock: Clock, collector: Any) -> None:
    collector.put(output(1, index=1))
    taken = [await collector.get()]
    for token, index in ((1, 0), (2, 1), (2, 0), (3, 1)):
        collector.put(output(token, index=index))
    collector.put(output(4, index=1, reason="length", finished=False))
    assert collector.get_nowait() is None, "one sequence has ended, the request has not"
    clock.tick()
    taken.append(await asyncio.wait_for(collector.get(), 5))
    assert sorted(told(taken)[1:]) == [
        (0, "12", (1, 2), [-0.125, -0.25], 3),
        (1, "234", (2, 3, 4), [-0.25, -0.375, -0.5], 6),
    ]


async def test_a_stream_counts_from_its_first_token_to_its_end() -> None:
    """The pace goes by how many run: 64 are held, one is not, and one that has answered at once never was any."""
    pace = Pace(1000)
    collectors = [collector_of(pace) for _ in range(64)]
    for collector in collectors:
        collector.put(output(1))
        await collector.get()
    whole = collector_of(pace, "FINAL_ONLY")
    whole.put(output(1, 2, reason="stop"))
    await whole.get()
    assert pace.hold(lambda: None)
    for collector in (*collectors, whole):
        collector.close()
        collector.close()
    assert not pace.hold(lambda: None)


def test_it_is_what_vllm_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import async_llm

    from sparse_serve.engine import vllm_pace

    monkeypatch.setattr(async_llm, "RequestOutputCollector", None)
    vllm_pace.install(Pace(1))
    made = async_llm.RequestOutputCollector(RequestOutputKind.DELTA, "one")
    assert isinstance(made, vllm_pace.PacedCollector) and made.aggregate
