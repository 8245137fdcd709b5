"""The HTTP port: admission, bounds, counting and clients that leave; with an application of a few lines behind it."""

import asyncio
import socket

import pytest

from sparse_serve.engine.fake import FakeEngine
from sparse_serve.runtime.errors import PortInUseError
from tests.sparse_serve.running import running


async def test_before_the_engine_is_up_everything_is_503_with_retry_after() -> None:
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        for response in (await server.http.get("/health"), await server.http.post("/v1/completions", json={})):
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert "starting" in response.json()["error"]["message"]
        server.engine.start_over.set()
        await server.until(lambda: server.is_ready)
        assert (await server.http.get("/health")).text == "/health"


async def test_requests_are_counted_and_timed() -> None:
    async with running() as server:
        response = await server.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4})
    assert response.text == "abca"
    assert server.metric("sparse_serve_requests_total", api="http", method="POST", code="200") == 1
    assert server.metric("sparse_serve_request_seconds_count", api="http", method="POST") == 1
    assert server.metric("sparse_serve_in_flight_requests", api="http") == 0
    assert server.metric("sparse_serve_cancelled_total", api="http") == 0


async def test_a_client_that_leaves_is_aborted_in_the_engine_and_counted() -> None:
    async with running(FakeEngine(delay_s=0.02)) as server:
        async with server.http.stream("POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 1000}) as response:
            async for _ in response.aiter_bytes():
                break
        await server.until(lambda: server.engine.unfinished == 0)
        await server.until(lambda: server.metric("sparse_serve_cancelled_total", api="http") == 1)
    assert len(server.engine.aborted) == 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413_and_never_reaches_the_application(chunked: bool) -> None:
    async def parts():
        for _ in range(4):
            yield b"x" * 1024

    async with running(max_message_bytes=2048) as server:
        content = parts() if chunked else b"x" * 4096
        response = await server.http.post("/v1/completions", content=content)
    assert response.status_code == 413
    assert "2048 bytes" in response.json()["error"]["message"]
    assert server.metric("sparse_serve_requests_total", api="http", method="POST", code="413") == 1


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_dropped() -> None:
    async with running() as server:
        _, writer = await asyncio.open_connection(server.http.base_url.host, server.http.base_url.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await server.until(lambda: server.metric("sparse_serve_in_flight_requests", api="http") == 1)
        writer.close()
        await server.until(lambda: server.metric("sparse_serve_in_flight_requests", api="http") == 0)
    assert server.engine.requests == []


async def test_while_draining_new_work_is_refused_but_metrics_are_readable() -> None:
    async with running(FakeEngine(delay_s=0.05)) as server:
        body = {"prompt": "ab", "max_tokens": 8}
        running_request = asyncio.create_task(server.http.post("/v1/completions", json=body))
        await server.until(lambda: server.engine.unfinished == 1)
        server.server.stop()
        await server.until(lambda: server.metric("sparse_serve_ready") == 0)
        refused = await server.http.post("/v1/completions", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "draining" in refused.json()["error"]["message"]
        assert (await server.http.get("/metrics")).text == "/metrics"
        assert (await running_request).text == "abababab"


async def test_a_taken_http_port_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"127.0.0.1:{port}: Address already in use.*--http-port"):
            async with running(http_port=port):
                pass


async def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(PortInUseError, match=r"192\.0\.2\.1"):
        async with running(host="192.0.2.1", insecure=True):
            pass


async def test_ipv6_addresses_are_printed_so_that_they_can_be_pasted() -> None:
    try:
        probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    probe.close()
    async with running(host="::1") as server:
        assert str(server.http.base_url).startswith("http://[::1]:")
        assert (await server.http.get("/ready")).status_code == 200
