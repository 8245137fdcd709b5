"""TLS in front of the HTTP protocol, with the limits of a connection from its first byte on.

asyncio can do handshakes by itself, but tells a protocol of a connection only after its handshake, of which a client
can then begin as many as it likes. Here it counts as a connection at once, and has `header_s` to get it done.
"""

import asyncio
import ssl
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Handshake(asyncio.Protocol):
    """A connection that does not speak TLS yet; afterwards it is `http`'s."""

    def __init__(self, http: HttpToolsProtocol, tls: ssl.SSLContext, max_connections: int, limit_s: float) -> None:
        self._http, self._tls, self._max_connections, self._limit_s = http, tls, max_connections, limit_s
        self._connections: set[Any] = http.connections
        self._transport: asyncio.Transport | None = None
        self._shaking: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self._transport = transport
        self._connections.add(self)
        if len(self._connections) > self._max_connections:
            transport.abort()
            return
        transport.pause_reading()  # what it says is for TLS to read
        transport.set_write_buffer_limits(0)
        self._shaking = asyncio.get_running_loop().create_task(self._shake(transport))

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left, or was refused."""
        self._connections.discard(self)

    def shutdown(self) -> None:
        """The server ends."""
        if self._transport is not None:
            self._transport.abort()

    async def _shake(self, transport: asyncio.Transport) -> None:
        early = _Early()
        try:
            made = await asyncio.get_running_loop().start_tls(
                transport,
                early,
                self._tls,
                server_side=True,
                ssl_handshake_timeout=self._limit_s,
                ssl_shutdown_timeout=self._limit_s,
            )
        except OSError:  # it left, spoke something else, or was too slow
            transport.abort()
        else:
            self._connections.discard(self)  # the next protocol counts itself
            if made is not None:
                early.hand_over(made, self._http)
        finally:
            self._connections.discard(self)


class _Early(asyncio.Protocol):
    """Keeps what comes between the end of a handshake and the moment that the task which waited for it runs."""

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._lost = False

    def data_received(self, data: bytes) -> None:
        self._data.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    def hand_over(self, transport: asyncio.Transport, http: asyncio.Protocol) -> None:
        """From now on, `http` is told. It is told of nothing if the client has left already."""
        if self._lost:
            return
        transport.set_protocol(http)
        http.connection_made(transport)
        for data in self._data:
            http.data_received(data)


def event_loop(tls: bool) -> asyncio.Runner:
    """What runs the server: uvloop, as in `vllm serve`, with which a token costs less than with asyncio's own loop.

    With TLS it is asyncio's: on uvloop the handshake of a test timed out; why is not known.
    """
    if tls:
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
