"""TLS handshakes: they are connections like others, with a limit to their number and their time."""

import asyncio
import ssl
from pathlib import Path

import httpx
import pytest

from sparse_serve.server.handshake import event_loop
from tests.sparse_serve.running import Running, running
from tests.sparse_serve.server.test_protocol import connection, ends
from tests.sparse_serve.server.test_tls import Authority


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    certificate, key = Authority.new("one").write(tmp_path, "server")
    return {"tls_cert": str(certificate), "tls_key": str(key)}


def anybody() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def is_ready(server: Running) -> bool:
    url = str(server.http.base_url).replace("http:", "https:")
    async with httpx.AsyncClient(verify=anybody(), base_url=url) as client:
        return (await client.get("/readyz")).status_code == 200


async def test_one_that_does_not_end_is_closed_in_the_time_of_a_header(tls: dict[str, str]) -> None:
    async with running(header_s=0.3, **tls) as server:
        for said in (b"", b"\x16\x03\x01\x02\x00\x01"):
            async with connection(server) as (reader, writer):
                writer.write(said)
                assert await ends(reader)
        assert await is_ready(server)


async def test_what_is_no_tls_is_closed_at_once(tls: dict[str, str]) -> None:
    async with running(**tls) as server, connection(server) as (reader, writer):
        writer.write(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert not (await reader.read()).startswith(b"HTTP")
        assert await is_ready(server)


async def test_they_count_as_connections(tls: dict[str, str]) -> None:
    async with running(max_connections=2, **tls) as server:
        async with connection(server), connection(server):
            await server.until(lambda: len(server.server.context.listener.connections) == 2)
            async with connection(server) as (reader, _):
                assert await ends(reader)
            with pytest.raises(httpx.TransportError):
                await is_ready(server)
        await server.until(lambda: not server.server.context.listener.connections)
        assert await is_ready(server)


async def test_a_server_that_ends_does_not_wait_for_them(tls: dict[str, str]) -> None:
    async with running(header_s=60.0, **tls) as server, connection(server):
        await server.until(lambda: len(server.server.context.listener.connections) == 1)
        server.server.stop()
        async with asyncio.timeout(30):
            assert await server.task == 0


async def test_what_comes_with_the_end_of_a_handshake_is_not_lost(tls: dict[str, str]) -> None:
    async with running(**tls) as server:
        for _ in range(20):
            reader, writer = await asyncio.open_connection(
                server.http.base_url.host, server.http.base_url.port, ssl=anybody()
            )
            writer.write(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            async with asyncio.timeout(30):
                assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()


async def test_the_last_connection_that_is_allowed_speaks(tls: dict[str, str]) -> None:
    async with running(max_connections=1, **tls) as server:
        assert await is_ready(server)


@pytest.mark.parametrize("tls", [False, True])
def test_with_tls_the_event_loop_is_asyncios_own(tls: bool) -> None:
    with event_loop(tls) as runner:
        assert type(runner.get_loop()).__module__.startswith("uvloop") is not tls
