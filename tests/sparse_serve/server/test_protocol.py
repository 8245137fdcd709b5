"""What connections may do; raw sockets against a server with a fake engine."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest

from sparse_serve.engine.fake import FakeEngine
from tests.sparse_serve.running import Running, running


@contextlib.asynccontextmanager
async def connection(server: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(server.http.base_url.host, server.http.base_url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ends(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes the connection, without a word, sooner than it would by default."""
    async with asyncio.timeout(8):
        try:
            return await reader.read() == b""
        except ConnectionError:
            return True


def post(max_tokens: int, query: bytes = b"") -> bytes:
    body = json.dumps({"prompt": "ab", "max_tokens": max_tokens}).encode()
    return b"POST /v1/completions%s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (query, len(body), body)


@pytest.mark.parametrize("lines", [1, 300])
async def test_a_header_that_is_too_large_is_431_and_the_connection_ends(lines: int) -> None:
    async with running(max_header_bytes=8192) as server, connection(server) as (reader, writer):
        value = b"x" * (20_000 // lines)
        header = b"".join(b"x-%d: %s\r\n" % (line, value) for line in range(lines))
        writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n")
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 431


async def test_a_header_of_too_many_lines_is_431() -> None:
    async with running() as server, connection(server) as (reader, writer):
        writer.write(b"GET /ready HTTP/1.1\r\n" + b"".join(b"x-%d: 1\r\n" % line for line in range(300)) + b"\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")


async def test_a_header_without_an_end_is_not_read_on() -> None:
    async with running() as server, connection(server) as (_, writer):
        writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\nx: ")
        with pytest.raises(ConnectionError):
            for _ in range(400):
                writer.write(b"x" * 65536)
                await writer.drain()
        assert (await server.http.get("/ready")).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /ready HT", b"GET /ready HTTP/1.1\r\nhost: x\r\n"])
async def test_a_connection_without_a_whole_header_ends(sent: bytes) -> None:
    async with running(header_s=0.2) as server, connection(server) as (reader, writer):
        writer.write(sent)
        assert await ends(reader)


async def test_an_answer_may_take_longer_than_a_header() -> None:
    async with running(FakeEngine(delay_s=0.05), header_s=0.1) as server:
        response = await server.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 8})
    assert response.text == "abababab"


async def test_a_body_that_does_not_arrive_is_408() -> None:
    async with running(body_s=0.2) as server, connection(server) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        assert server.metric("sparse_serve_requests_total", api="http", method="POST", code="408") == 1


async def test_a_drain_does_not_wait_for_a_body_that_does_not_arrive() -> None:
    async with running(drain_s=30.0) as server, connection(server) as (_, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await server.until(lambda: server.metric("sparse_serve_in_flight_requests", api="http") == 1)
        server.server.stop()
        async with asyncio.timeout(20):
            assert await server.task == 0


async def test_a_client_that_does_not_read_is_closed_and_its_request_aborted() -> None:
    async with running(FakeEngine(), write_s=0.3) as server, connection(server) as (_, writer):
        writer.transport.pause_reading()
        writer.write(post(4_000, b"?wide"))
        await server.until(lambda: len(server.engine.aborted) == 1)
        await server.until(lambda: server.metric("sparse_serve_in_flight_requests", api="http") == 0)
    assert server.metric("sparse_serve_cancelled_total", api="http") == 1


async def test_what_is_left_of_an_answer_is_not_kept_for_a_client_that_does_not_read() -> None:
    """Less than asyncio would tell of, and the connection is to be closed once it is written."""
    async with running(write_s=0.3) as server, connection(server) as (_, writer):
        writer.transport.pause_reading()
        small = writer.get_extra_info("socket")
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        (served,) = [one for one in server.server.context.listener.connections if one.client == small.getsockname()]
        served.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        writer.write(post(4, b"?wide").replace(b"host: x", b"host: x\r\nconnection: close"))
        await server.until(lambda: 0 < served.transport.get_write_buffer_size() < 65536)
        await server.until(lambda: served not in server.server.context.listener.connections)


async def test_half_a_header_behind_an_answer_may_come_later_and_not_never() -> None:
    async with running(FakeEngine(delay_s=0.05), header_s=0.3) as server, connection(server) as (reader, writer):
        writer.write(post(8) + b"GET /health HTTP/1.1\r\nhost: x\r\n")
        answer = await reader.readuntil(b"\r\n0\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.write(b"\r\n")
        answer += await reader.readuntil(b"\r\n0\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200 OK") == 2
        writer.write(post(8) + b"GET /health HTTP/1.1\r\nhost: x\r\n")
        await reader.readuntil(b"\r\n0\r\n\r\n")
        ended_s = asyncio.get_running_loop().time()
        assert await ends(reader)
        assert 0.2 < asyncio.get_running_loop().time() - ended_s < 8


async def test_requests_behind_one_another_are_answered_in_order() -> None:
    async with running(FakeEngine(delay_s=0.01)) as server, connection(server) as (reader, writer):
        writer.write(post(3) + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
    assert answer.count(b"HTTP/1.1 200 OK") == 2 and answer.endswith(b"/health\r\n0\r\n\r\n")


@pytest.mark.parametrize("behind", [b"", b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n", post(5), post(5)[:-3]])
async def test_a_client_that_leaves_is_noticed_whatever_it_sent_behind_its_request(behind: bytes) -> None:
    async with running(FakeEngine(delay_s=0.01)) as server, connection(server) as (reader, writer):
        writer.write(post(100_000) + behind)
        await reader.read(10)
        writer.close()
        await server.until(lambda: server.engine.unfinished == 0)
        await server.until(lambda: server.metric("sparse_serve_in_flight_requests", api="http") == 0)
    assert len(server.engine.requests) == len(server.engine.aborted) == 1


async def test_too_many_requests_behind_one_another_end_the_connection() -> None:
    async with running(FakeEngine(delay_s=0.01)) as server, connection(server) as (_, writer):
        writer.write(post(100_000) * 30)
        await server.until(lambda: len(server.engine.aborted) == 1)
    assert len(server.engine.requests) == 1


async def test_connections_over_the_limit_are_closed_at_once() -> None:
    async with running(max_connections=3) as server:
        async with connection(server), connection(server), connection(server), connection(server) as (reader, _):
            assert await ends(reader)
        await asyncio.sleep(0.1)
        assert (await server.http.get("/ready")).status_code == 200


@pytest.mark.parametrize(
    "then",
    [
        b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n@\r\n",
        b"POST /ready HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n@x",
        b"POST /ready HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n@0\r\n",
    ],
)
async def test_what_comes_after_an_answer_keeps_nothing_open(then: bytes) -> None:
    first, second = then.split(b"@")
    async with running(header_s=0.3) as server, connection(server) as (reader, writer):
        writer.write(first)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.write(second)
        async with asyncio.timeout(30):
            with contextlib.suppress(ConnectionError):
                await reader.read()


@pytest.mark.parametrize("behind", [b"a: b\r\n" * 1000, b"a: " + b"b" * 100_000])
async def test_trailers_have_a_limit_like_headers(behind: bytes) -> None:
    async with running(max_header_bytes=1024, max_message_bytes=1024) as server, connection(server) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + behind)
        assert await ends(reader)
        assert (await server.http.get("/ready")).status_code == 200
