"""Many at once who mean no good: what they leave behind, and what others notice of them. With a fake engine."""

import asyncio
import contextlib
import gc
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.api.pb.v1 import generation_pb2_grpc
from sparse_serve.engine.fake import FakeEngine
from tests.sparse_serve.running import Running, running

BODY = {"prompt": "ab", "max_tokens": 200}
SHORT = {"prompt": "ab", "max_tokens": 2}
HALF = b"POST /v1/completions HTTP/1.1\r\nHo"
UNREAD = (
    b'POST /v1/completions?wide HTTP/1.1\r\nhost: x\r\ncontent-length: 35\r\n\r\n{"prompt": "ab", "max_tokens": 4000}'
)


def asked(tokens: int, kind: type = pb.GenerateRequest) -> pb.GenerateRequest:
    return kind(text="ab", sampling=pb.Sampling(max_tokens=tokens))


async def is_left_alone(server: Running) -> None:
    """Nothing is inside any more, and the next request is answered."""
    await server.until(lambda: server.engine.unfinished == 0)
    await server.until(lambda: server.server.context.admission.in_flight == 0)
    assert (await server.http.post("/v1/completions", json=SHORT)).text == "ab"
    assert (await server.stub.Generate(asked(2))).text == "ab"


async def test_a_storm_of_cancels_leaves_nothing_behind() -> None:
    chance = random.Random(7)

    async def one(server: Running, number: int) -> str:
        task: asyncio.Future
        if number % 2:
            task = asyncio.ensure_future(server.http.post("/v1/completions", json=BODY))
        else:
            task = asyncio.ensure_future(anext(aiter(server.stub.GenerateStream(asked(200, pb.GenerateStreamRequest)))))
        await asyncio.sleep(chance.random() * 0.2)
        task.cancel()
        (end,) = await asyncio.gather(task, return_exceptions=True)
        return type(end).__name__

    async with running(FakeEngine(delay_s=0.01), max_sequences_per_client=512) as server:
        for _ in range(4):
            ends = Counter(await asyncio.gather(*(one(server, number) for number in range(100))))
        assert ends["CancelledError"] > 20, ends
        await is_left_alone(server)


async def test_thousands_of_streams_of_a_connection_are_bounded_and_others_go_on() -> None:
    """Those over `max_streams` wait at the client, those over a client's share are refused."""

    async def first(stub: generation_pb2_grpc.GenerationServiceStub) -> str:
        call = stub.GenerateStream(asked(4000, pb.GenerateStreamRequest))
        try:
            await anext(aiter(call))
        except grpc.aio.AioRpcError as error:
            return error.code().name
        except asyncio.CancelledError:
            call.cancel()
            return "waited"
        return "answered"

    async with running(FakeEngine(delay_s=0.05), max_sequences_per_client=8, max_streams=32) as server:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(server.grpc_address, options=options) as flood:
            stub = generation_pb2_grpc.GenerationServiceStub(flood)
            tasks = [asyncio.create_task(first(stub)) for _ in range(3000)]
            await server.until(lambda: server.engine.unfinished == 8)
            for _ in range(5):
                began_s = time.monotonic()
                assert (await server.stub.Generate(asked(2))).text == "ab"
                assert time.monotonic() - began_s < 20
                assert server.engine.unfinished <= 9
            for task in tasks:
                task.cancel()
            ends = Counter(await asyncio.gather(*tasks))
        assert set(ends) <= {"answered", "waited", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}  # the last: opened too early
        await is_left_alone(server)


@contextlib.asynccontextmanager
async def besieged(server: Running) -> AsyncIterator[None]:
    """300 half requests, 40 readers that do not read, and four clients that never stop."""
    port = server.http.base_url.port
    writers = []
    for sent in (*[HALF] * 300, *[UNREAD] * 40):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(sent)
        writers.append(writer)

    async def flood() -> None:
        async with grpc.aio.insecure_channel(
            server.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            while True:
                calls = [stub.Generate(asked(20)) for _ in range(16)]
                await asyncio.gather(*calls, return_exceptions=True)

    floods = [asyncio.create_task(flood()) for _ in range(4)]
    try:
        yield
    finally:
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        for writer in writers:
            writer.close()


async def test_a_good_client_is_served_beside_those_who_hold_connections_and_those_who_flood() -> None:
    limits = {"max_num_queued_reqs": 96, "max_sequences_per_client": 64, "header_s": 1.0, "write_s": 1.0}
    async with running(FakeEngine(delay_s=0.01), **limits) as server:
        async with besieged(server):
            worst_s = 0.0
            for number in range(30):
                began_s = time.monotonic()
                if number % 2:
                    assert (await server.http.post("/v1/completions", json=SHORT)).text == "ab"
                else:
                    assert (await server.stub.Generate(asked(2))).text == "ab"
                worst_s = max(worst_s, time.monotonic() - began_s)
        assert worst_s < 20, "0.02 s alone; what the others can take is bounded"
        await server.until(lambda: len(server.server.context.listener.connections) <= 1)
        await is_left_alone(server)


async def test_memory_does_not_grow_with_the_number_of_requests() -> None:
    async def some(server: Running, count: int) -> None:
        for _ in range(count):
            await server.http.post("/v1/completions", json=SHORT)
            await server.http.post("/v1/completions", json={"prompt": "ab", "n": 10_000})
            await server.stub.Generate(asked(2))

    async with running() as server:
        await some(server, 60)
        tracemalloc.start()
        try:
            await some(server, 60)
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            server.engine.requests.clear()
            server.engine.origins.clear()
            await some(server, 200)
            server.engine.requests.clear()
            server.engine.origins.clear()
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 200 * 3 * 64, "bytes; an object kept for each request would be more"


@pytest.mark.parametrize("timeout_s", [0.001, 0.05])
async def test_a_deadline_too_short_for_anything_is_its_own_status(timeout_s: float) -> None:
    async with running(FakeEngine(delay_s=0.05)) as server:
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await server.stub.Generate(asked(200), timeout=timeout_s)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await is_left_alone(server)


async def test_malformed_calls_end_with_a_status_and_leave_the_connection_alone() -> None:
    async with running() as server:
        path = "/sparse_serve.v1.GenerationService/Generate"
        raw = server.channel.unary_unary(path, response_deserializer=pb.GenerateResponse.FromString)
        known = asked(2).SerializeToString()
        assert (await raw(known + b"\xfa\x7f\x03new")).text == "ab", "a field of a later version"
        for wrong in (b"\x08\x01" * 9, b"\xff" * 64, known[:-1], b"\x0a\xff\xff\xff\xff\x7f"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await raw(wrong)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await raw(known, metadata=(("x-large", "a" * (1 << 20)),))
        assert error.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
        for method in ("/sparse_serve.v1.GenerationService/Nothing", "/nobody.Service/Generate", "/"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await server.channel.unary_unary(method)(b"")
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            assert (await server.stub.Generate(asked(2), compression=compression)).text == "ab"
        bomb = pb.GenerateRequest(text="a" * (64 << 20))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await server.stub.Generate(bomb, compression=grpc.Compression.Gzip)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await is_left_alone(server)
