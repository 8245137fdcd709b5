"""The HTTP port: one socket, bound before the engine loads, that APIs mount on.

The socket is bound first so that a taken port is known in milliseconds rather than after the model has loaded, and it
answers from then on: mounted routes always, everything else with 503 until a main application (vLLM's OpenAI routes)
is there. Requests that can start work, which is all but GET and HEAD, pass a gatekeeper. It refuses them while the
process is not taking requests, bounds their body, counts them, and notices a client that leaves. Metrics and health
stay readable while draining.

The body is read before the application sees the request: a limit that strikes in the middle of somebody else's parser
would be answered with whatever that parser makes of it.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from sparse_serve.runtime.errors import PortInUseError, ServeError, answer
from sparse_serve.server.admission import Admission, Outcome

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


class HttpListener:
    """An HTTP listener with mounted routes, and a main application behind a gatekeeper."""

    def __init__(self, host: str, port: int, admission: Admission, max_body_bytes: int) -> None:
        self._host, self._port = host, port
        self._admission = admission
        self._max_body_bytes = max_body_bytes
        self._routes: dict[str, ASGIApp] = {}
        self._main: ASGIApp = _nothing_here
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    def mount(self, path: str, app: ASGIApp) -> None:
        """Answer exactly this path with `app`, in every phase and uncounted."""
        self._routes[path] = app

    def set_main(self, app: ASGIApp) -> None:
        """Answer every path that is not mounted with `app`."""
        self._main = app

    async def start(self) -> str:
        """Bind and answer. Returns `host:port` with the real port. Raises `PortInUseError`."""
        listener = _listen(self._host, self._port)
        config = uvicorn.Config(
            self._dispatch, interface="asgi3", lifespan="off", log_config=None, log_level="warning", access_log=False
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        address = _address_text(listener)
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(0.01)
        return address

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, give running requests `grace_s` seconds, cancel the rest and close."""
        if self._server is None or self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await self._task

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"])
        if route is not None:
            await route(scope, receive, send)
            return
        method = scope.get("method", "WEBSOCKET")
        safe = method in ("GET", "HEAD")
        try:
            if not safe or self._main is _nothing_here:
                self._admission.check()
        except ServeError as error:
            await _refusal(scope, error)(scope, receive, send)
            return
        if safe:
            await self._main(scope, receive, send)
        else:
            await self._counted(method, scope, receive, send)

    async def _counted(self, method: str, scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission.request("http", method if method in _METHODS else "other") as outcome:
            outcome.code = "none"
            if scope["type"] == "http":
                body = await _read_body(Request(scope, receive), self._max_body_bytes)
                if body is None:
                    outcome.cancelled = True
                    return
                if len(body) > self._max_body_bytes:
                    outcome.code = "413"
                    too_large = _error(413, f"the request body is over {self._max_body_bytes} bytes")
                    await too_large(scope, receive, send)
                    return
                watch = _Watch(outcome, body, receive, send)
                receive, send = watch.receive, watch.send
            await self._main(scope, receive, send)


class _Watch:
    """Stands between an application and its client: replays the body, records the status, and a client leaving."""

    def __init__(self, outcome: Outcome, body: bytes, receive: Receive, send: Send) -> None:
        self._outcome, self._receive, self._send = outcome, receive, send
        self._body: bytes | None = body
        self._finished = False

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._finished:
            self._outcome.cancelled = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._outcome.code = str(message["status"])
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
        await self._send(message)


class _Server(uvicorn.Server):
    """Leaves signals to the process: the whole server drains, not the HTTP part alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _error(status: int, message: str, retry_s: float | None = None) -> JSONResponse:
    """An answer in the shape of the OpenAI API's errors. It closes: a refused body may not have been read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"connection": "close"}
    if retry_s is not None:
        headers["retry-after"] = str(max(1, round(retry_s)))
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status, headers)


def _refusal(scope: Scope, error: ServeError) -> ASGIApp:
    if scope["type"] == "websocket":
        return WebSocketClose(code=1013)
    refusal = answer(error)
    return _error(refusal.http_status, refusal.message, refusal.retry_s)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    await _error(404, f"there is nothing at {scope['path']}")(scope, receive, send)


async def _read_body(request: Request, limit_bytes: int) -> bytes | None:
    """The body, read no further than just past the limit. None: the client left in the middle of it."""
    body = bytearray()
    try:
        async with contextlib.aclosing(request.stream()) as parts:
            async for part in parts:
                body += part
                if len(body) > limit_bytes:
                    break
    except ClientDisconnect:
        return None
    return bytes(body)


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
