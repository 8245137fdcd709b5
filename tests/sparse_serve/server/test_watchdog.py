"""An engine that lives and does nothing."""

import asyncio
import time

import grpc
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.server.lifecycle import EngineHung, Stopped
from sparse_serve.server.watchdog import until_hung
from tests.sparse_serve.running import running


async def test_a_hung_engine_ends_the_process_with_1_and_tells_who_waits() -> None:
    async with running(FakeEngine(delay_s=0.01), watchdog_s=0.4) as server:
        call = server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=4000)))
        over_http = asyncio.create_task(
            server.http.post("/v1/completions?late", json={"prompt": "ab", "max_tokens": 4000})
        )
        await server.until(lambda: server.engine.unfinished == 2)
        server.engine.hangs = True
        assert (await over_http).status_code == 503
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await call
        assert await server.task == 1
    assert server.events[2:] == [EngineHung(0.4), Stopped()]


async def test_an_engine_is_given_its_time() -> None:
    engine = FakeEngine()
    engine.hangs = True
    began_s = time.monotonic()
    async with asyncio.timeout(30):
        await until_hung(engine, 0.4)
    assert 0.35 < time.monotonic() - began_s < 15


@pytest.mark.parametrize("busy", [True, False])
async def test_an_engine_that_works_or_answers_is_left_alone(busy: bool) -> None:
    async with running(FakeEngine(delay_s=0.03), watchdog_s=0.2) as server:
        if busy:
            call = server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=30)))
            assert len((await call).text) == 30
        else:
            await asyncio.sleep(0.8)
        assert not server.task.done()


async def test_one_miss_is_none() -> None:
    """A server that was suspended finds its time limits over."""
    engine = FakeEngine()
    watching = asyncio.create_task(until_hung(engine, 0.8))
    for _ in range(3):
        engine.hangs = True
        await asyncio.sleep(0.3)
        engine.hangs = False
        engine.progress.stepped()
        await asyncio.sleep(0.3)
    assert not watching.done()
    watching.cancel()


async def test_an_engine_that_rests_is_no_engine_that_hangs() -> None:
    engine = FakeEngine()
    engine.hangs = engine.paused = True
    watching = asyncio.create_task(until_hung(engine, 0.2))
    await asyncio.sleep(0.6)
    assert not watching.done()
    engine.paused = False
    async with asyncio.timeout(30):
        await watching
