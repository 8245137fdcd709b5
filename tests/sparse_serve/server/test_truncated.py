"""What metrics say of requests: every one is counted, and answers without an end by the reason for it."""

import asyncio
import contextlib
import json

import grpc
import httpx
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.runtime.errors import OverloadedError
from sparse_serve.server.admission import Cause, Outcome
from sparse_serve.server.answers import Watch
from tests.sparse_serve.running import Running, running

LONG = {"prompt": "ab", "max_tokens": 4000}


def truncated(server: Running, api: str) -> dict[str, float]:
    """By cause, of those that there are."""
    (family,) = [one for one in server.registry.collect() if one.name == "sparse_serve_truncated_streams"]
    return {
        sample.labels["cause"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["api"] == api and sample.value
    }


async def begun_http(server: Running, query: str = "?sse") -> asyncio.Task:
    task = asyncio.create_task(server.http.post(f"/v1/completions{query}", json=LONG))
    await server.until(lambda: server.engine.unfinished == 1)
    await asyncio.sleep(0.05)
    return task


async def begun_grpc(server: Running, **more) -> grpc.aio.UnaryStreamCall:
    request = pb.GenerateStreamRequest(text="ab", sampling=pb.Sampling(max_tokens=4000))
    call = server.stub.GenerateStream(request, **more)
    await call.read()
    return call


async def test_whole_answers_are_not_truncated() -> None:
    async with running() as server:
        await server.http.post("/v1/completions?sse", json={"prompt": "ab", "max_tokens": 3})
        request = pb.GenerateStreamRequest(text="ab", sampling=pb.Sampling(max_tokens=3))
        assert len([piece async for piece in server.stub.GenerateStream(request)]) == 3
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await server.stub.GenerateStream(pb.GenerateStreamRequest()).read()
    assert truncated(server, "http") == truncated(server, "grpc") == {}
    (family,) = [one for one in server.registry.collect() if one.name == "sparse_serve_truncated_streams"]
    assert {sample.labels["cause"] for sample in family.samples} == {cause.value for cause in Cause}, "each begins at 0"


async def test_a_client_that_leaves() -> None:
    async with running(FakeEngine(delay_s=0.01)) as server:
        task = await begun_http(server)
        task.cancel()
        await server.until(lambda: truncated(server, "http") == {"client": 1})
        (await begun_grpc(server)).cancel()
        await server.until(lambda: truncated(server, "grpc") == {"client": 1})


async def test_a_deadline() -> None:
    async with running(FakeEngine(delay_s=0.01)) as server:
        call = await begun_grpc(server, timeout=0.3)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await server.until(lambda: truncated(server, "grpc") == {"deadline": 1})
    method = {"api": "grpc", "method": "GenerateStream"}
    assert server.metric("sparse_serve_requests_total", code="DEADLINE_EXCEEDED", **method) == 1


async def test_a_client_that_does_not_read() -> None:
    async with running(FakeEngine(), write_s=0.3) as server:
        _, writer = await asyncio.open_connection(server.http.base_url.host, server.http.base_url.port)
        writer.transport.pause_reading()
        body = b'{"prompt": "ab", "max_tokens": 4000}'
        head = b"POST /v1/completions?wide HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await server.until(lambda: truncated(server, "http") == {"unread": 1})
        writer.transport.abort()


async def test_the_end_of_a_drain() -> None:
    async with running(FakeEngine(delay_s=0.01), drain_s=0.2) as server:
        tasks = await begun_http(server), await begun_grpc(server)
        server.server.stop()
        await server.task
        await tasks[0]
    assert truncated(server, "http") == truncated(server, "grpc") == {"drain": 1}


@pytest.mark.parametrize("how", ["dies", "hangs"])
async def test_an_engine_that_is_no_more(how: str) -> None:
    async with running(FakeEngine(delay_s=0.01), watchdog_s=0.4) as server:
        task, _ = await begun_http(server), await begun_grpc(server)
        if how == "dies":
            server.engine.die()
        else:
            server.engine.hangs = True
        await server.task
        with contextlib.suppress(OSError, httpx.TransportError):
            await task
    assert truncated(server, "grpc") == {"engine": 1}
    assert sum(truncated(server, "http").values()) == 1


async def test_an_error_in_the_middle() -> None:
    async with running(FakeEngine(delay_s=0.02)) as server:
        call = await begun_grpc(server)
        server.engine.fail_with = OverloadedError("full")
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert truncated(server, "grpc") == {"error": 1}


async def test_every_request_is_counted_and_no_probe_is_waited_for() -> None:
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        assert (await server.http.get("/v1/models")).status_code == 503
        server.engine.start_over.set()
        await server.until(lambda: server.is_ready)
        for path, status in (("/v1/models", 200), ("/readyz", 200), ("/nothing", 404), ("/metrics", 200)):
            assert (await server.http.get(path)).status_code == status
        await server.http.head("/health")
        found = {code: server.metric("sparse_serve_requests_total", api="http", method="GET", code=code) for code in
                 ("503", "200", "404")}  # fmt: skip
        assert found == {"503": 1, "200": 3, "404": 1}
        assert server.metric("sparse_serve_requests_total", api="http", method="HEAD", code="200") == 1
        assert server.metric("sparse_serve_request_seconds_count", api="http", method="GET") == 5


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"message": "See stack trace", "type": "InternalServerError", "code": 500}}\n\n',
        b'event: error\ndata: {"type": "error", "message": "See \\"stack\\" trace", "code": "server_error"}\n\n',
        b'event: response.failed\ndata: {"response":{"error":{"message":"See stack trace","code":"a"},"id":"b"}}\n\n',
    ],
)
@pytest.mark.parametrize(("died", "cause"), [(False, Cause.ERROR), (True, Cause.ENGINE)])
async def test_an_error_that_vllm_tells_as_an_event(event: bytes, died: bool, cause: Cause) -> None:
    sent, outcome = [], Outcome()

    async def send(message) -> None:
        sent.append(message)

    watch = Watch(outcome, {}, None, send, lambda: died)
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await watch.send({"type": "http.response.start", "status": 200, "headers": headers})
    for said in (b'data: {"choices": []}\n\n', event, b"data: [DONE]\n\n"):
        assert outcome.truncated is None or said.endswith(b"[DONE]\n\n")
        await watch.send({"type": "http.response.body", "body": said, "more_body": True})
    await watch.send({"type": "http.response.body", "body": b""})
    watch.record_end()
    assert outcome.truncated is cause and len(sent) == 5, "the client hears all of it"
    heard = sent[2]["body"]
    if not died:
        assert heard == event
        return
    name, _, data = heard.rpartition(b"data: ")
    said = json.loads(data)
    assert heard.endswith(b"\n\n") and name == event.rpartition(b"data: ")[0]
    assert b"stack" not in heard and heard.count(b"the engine has died") == 1
    assert name or said["error"]["code"] == 503
    assert name != b"event: response.failed\n" or said["response"]["id"] == "b"
