"""The HTTP port: one socket, bound before the engine loads, that APIs mount on.

The socket is bound first so that a taken port is known in milliseconds rather than after the model has loaded, and it
answers from then on: mounted routes always, everything else with 503 until a main application (vLLM's OpenAI routes)
is there. `gatekeeper` stands before that application, `protocol` bounds what connections may do.
"""

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from sparse_serve.runtime.errors import PortInUseError
from sparse_serve.server.cors import Cors
from sparse_serve.server.gatekeeper import Gatekeeper
from sparse_serve.server.protocol import ConnectionLimits, limited


class HttpListener:
    """An HTTP listener with mounted routes, and a main application behind a gatekeeper. With `tls`, it speaks HTTPS."""

    def __init__(
        self, host: str, port: int, gatekeeper: Gatekeeper, limits: ConnectionLimits, tls: ssl.SSLContext | None = None
    ) -> None:
        self._host, self._port = host, port
        self._gatekeeper, self._limits, self._tls = gatekeeper, limits, tls
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    def mount(self, path: str, app: ASGIApp, needs_key: bool = True) -> None:
        """Answer exactly this path with `app`, in every phase, to those with a key or to everybody."""
        self._gatekeeper.mount(path, app, needs_key)

    @property
    def connections(self) -> frozenset[Any]:
        """Those that are open now, as uvicorn's protocol objects."""
        return frozenset(self._server.server_state.connections if self._server is not None else ())

    def set_main(self, app: ASGIApp) -> None:
        """Answer every path that is not mounted with `app`."""
        self._gatekeeper.main = app

    def set_cors(self, cors: Callable[[], Cors | None]) -> None:
        """Go by this for which pages may read answers; None while it is not known."""
        self._gatekeeper.cors = cors

    async def start(self) -> str:
        """Bind and answer. Returns `host:port` with the real port. Raises `PortInUseError`."""
        listener = _listen(self._host, self._port)
        _allow_files()
        config = uvicorn.Config(
            self._gatekeeper,
            http=limited(self._limits, self._tls, self._gatekeeper.cors_headers),
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # a client could say that it is another one
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        address = _address_text(listener)
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(0.01)
        return address

    def cut_off(self) -> None:
        """End every request that is being answered, with an error."""
        self._gatekeeper.cut_off()

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, give running requests `grace_s` seconds, cancel the rest and close."""
        if self._server is None or self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await self._task


class _Server(uvicorn.Server):
    """Leaves signals to the process: the whole server drains, not the HTTP part alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _allow_files() -> None:
    """Let this process hold as many connections as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises `PortInUseError` naming the address and the way out."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PortInUseError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        message = f"HTTP address {host}:{port}: {error.strerror}; choose another with --http-port (0: any free one)"
        raise PortInUseError(message) from None
    return listener


def _address_text(listener: socket.socket) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
