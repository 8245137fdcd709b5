"""uvicorn's HTTP/1.1 protocol with limits: what a client may keep open, send before its request is there, and not read.

uvicorn has a time limit for one thing, an idle connection after an answer. Here every state of a connection has one:

    TLS handshake under way                `header_s`, then closed (`handshake`)
    nothing, or half a header, received    `header_s`, then closed; behind an answer, from its end on
    header over `max_header_bytes`, or of more than `MAX_HEADER_LINES` lines    431, then closed
    request over `max_request_bytes`, trailers too    closed; below that, the gatekeeper has limits of its own
    what is left of a request when it has been answered    closed
    answer that the client does not read   `write_s`, then closed, whether the answer is complete or not
    other requests before the answer       `MAX_PIPELINED` of them, and little of a body, then closed
    more than `max_connections`            closed at once

uvicorn stops reading when a second request arrives before the first is answered, and tells the second alone when the
client leaves. Here it goes on reading, and the one that is being answered is told.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sparse_serve.server.answers import UNREAD
from sparse_serve.server.handshake import Handshake

MAX_HEADER_LINES = 256
MAX_PIPELINED = 16


@dataclass(frozen=True)
class ConnectionLimits:
    """Of all connections together, and of each: see the top of this file."""

    max_connections: int
    max_header_bytes: int
    max_request_bytes: int
    header_s: float
    write_s: float


def limited(limits: ConnectionLimits, tls: ssl.SSLContext | None, more: Callable[[Headers], Mapping[str, str]]) -> Any:
    """uvicorn's protocol, bounded by `limits`, with `tls` before it; uvicorn makes an object of it for each connection,
    as it would of a class. `more` are headers for a refusal, by those of the request as far as they are known."""

    class Limited(LimitedProtocol):
        connection_limits = limits
        more_headers = staticmethod(more)

    def make(**given: Any) -> asyncio.Protocol:
        protocol = Limited(**given)
        return Handshake(protocol, tls, limits.max_connections, limits.header_s) if tls else protocol

    return make


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    connection_limits: ConnectionLimits
    more_headers: Callable[[Headers], Mapping[str, str]]

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _request_bytes = 0
    _whole = True
    """Whether the last byte of the request has been received."""
    _refused = False
    _between = True
    """Whether no header is being received: before its first byte, and after its last."""
    _answering: RequestResponseCycle | None = None
    """The request that is being answered, where others wait behind it."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self.connection_limits.max_connections:
            transport.abort()
            return
        # to be told of every byte that the system does not take at once, and not of 64 KB; TLS counts from this one on
        transport.set_write_buffer_limits(1 if self.scheme == "https" else 0)
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was closed."""
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a header or of a body."""
        if self._refused:
            return
        super().data_received(data)
        if self._refused:
            return
        self._request_bytes += len(data)
        if not self._between and self._request_bytes > self.connection_limits.max_header_bytes:
            self._refuse_header()
        elif not self._whole and self._request_bytes > self.connection_limits.max_request_bytes:
            self._abort()
        elif self._header_timer is None and self.timeout_keep_alive_task is None and self._is_idle:
            self._expect_header()  # an empty line is no request, and has ended uvicorn's wait for one

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of a header, or of the trailers behind a body."""
        if self._between and len(self.headers) > MAX_HEADER_LINES:
            self._abort()
        else:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._between, self._whole, self._request_bytes = False, False, 0
        if self._header_timer is None:
            self._expect_header()

    def on_headers_complete(self) -> None:
        """The header is there."""
        self._between = True
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.connection_limits.max_header_bytes or len(self.headers) > MAX_HEADER_LINES:
            self._refuse_header()
        if self._refused:
            return
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle
            return
        self.flow.resume_reading()
        if len(self.pipeline) > MAX_PIPELINED:
            self._abort()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        if self._refused:
            return
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
            self._abort()

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self._whole = True
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The last byte of an answer; the request behind it is next."""
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.pipeline or not self._is_idle:
            return
        if not self._between:  # the next request has begun
            if self._header_timer is None:
                self._expect_header()
        elif not self._whole:
            self._refused = True
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.connection_limits.write_s, self._end_unread)

    def resume_writing(self) -> None:
        """It has read."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _expect_header(self) -> None:
        self._header_timer = self.loop.call_later(self.connection_limits.header_s, self._end)

    def _end(self) -> None:
        self._header_timer = None
        if self._is_idle:
            self.transport.abort()

    def _end_unread(self) -> None:
        answering = self._answering or self.cycle
        if answering is not None:
            answering.scope[UNREAD] = True
        self._abort()

    def _abort(self) -> None:
        self._refused = True
        self.transport.abort()

    def _refuse_header(self) -> None:
        """431, after which nothing that was sent is looked at."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._abort()
            return
        self._refused = True
        text = b'{"error":{"message":"the header of the request is too large","type":"invalid_request_error",'
        text += b'"param":null,"code":431}}'
        more = self.more_headers(Headers(raw=self.headers)).items()
        lines = b"".join(b"%s: %s\r\n" % (name.encode(), value.encode("latin-1")) for name, value in more)
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n%s"
            b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (lines, len(text), text)
        )
        self.transport.close()
