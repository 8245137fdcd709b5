"""Stands before every HTTP application: who may come in, where to, with what, and how an answer ends.

In this order: the request's id (the client's, from `X-Request-Id`, or a new one; the answer has it too, and so has
vLLM), the key, the path, and for all but GET and HEAD whether requests are taken, the body with its limits in bytes,
time and content, and the share of one client. What fails is answered here, in the shape of the OpenAI API's errors.

The body is read before the application sees the request: a limit that strikes in the middle of somebody else's parser
would be answered with whatever that parser makes of it.

An answer that is cut off at the end of a drain says so: with 503, or in the last event of a stream. When the engine has
died, that is the answer, whatever status the application found for it.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from sparse_serve.runtime.errors import EngineDiedError, ServeError, UnauthenticatedError, UnavailableError, answer
from sparse_serve.server.admission import Admission, Outcome, Phase
from sparse_serve.server.body_limits import BodyLimits, check_request_id
from sparse_serve.server.keys import Keys

REQUEST_ID = "x-request-id"
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
_METRICS = "/metrics"
_RETRY_S = 1.0


@dataclass(frozen=True)
class Rules:
    """What the gatekeeper goes by. `serves` says whether there is something at a path."""

    max_body_bytes: int
    body_s: float
    limits: BodyLimits
    keys: Keys | None
    serves: Callable[[str], bool]


class Gatekeeper:
    """An application around `main`, which is None while the model loads. `died` says whether the engine has."""

    def __init__(self, admission: Admission, rules: Rules, died: Callable[[], bool]) -> None:
        self.main: ASGIApp | None = None
        self._admission, self._rules, self._died = admission, rules, died
        self._running: set[asyncio.Task[None]] = set()
        self._cutting = False

    def cut_off(self) -> None:
        """End every request that is being answered, with an error."""
        self._cutting = True
        for task in self._running:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or a websocket's handshake."""
        if scope["type"] != "http":
            await WebSocketClose(code=1008)(scope, receive, send)
            return
        try:
            id_ = _request_id(scope)
        except ServeError as error:
            await refusal(error)(scope, receive, with_id(send, new_id()))
            return
        send = with_id(send, id_)
        try:
            client = self.client(scope)
            if not self._rules.serves(scope["path"]):
                await error_response(404, f"there is nothing at {scope['path']}")(scope, receive, send)
                return
            is_safe = scope["method"] in ("GET", "HEAD")
            is_readable = is_safe and (self._admission.phase is not Phase.DEAD or scope["path"] == _METRICS)
            if self.main is None or not is_readable:
                self._admission.check()
        except ServeError as error:
            await refusal(error)(scope, receive, send)
            return
        assert self.main is not None
        if is_safe:
            await self.main(scope, receive, send)
        else:
            await self._counted(id_, client, scope, receive, send)

    def client(self, scope: Scope) -> str:
        """Who asks: the owner of a key, or without keys, a connection. Raises `UnauthenticatedError`."""
        if self._rules.keys is not None:
            return self._rules.keys.client(Headers(scope=scope).get("authorization"))
        host, port = scope.get("client") or ("", 0)
        return f"{host}:{port}"

    async def _counted(self, id_: str, client: str, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        with self._admission.request("http", method) as outcome:
            outcome.code, outcome.id, outcome.client = "none", id_, client
            body = await self._body(outcome, scope, receive, send)
            if body is None:
                return
            watch = _Watch(outcome, body, receive, send, self._died)
            try:
                self._admission.check()
                with self._admission.share(client, self._rules.limits.check(body)):
                    await self._run(watch, scope)
            except ServeError as error:
                await refusal(error)(scope, receive, watch.send)

    async def _run(self, watch: "_Watch", scope: Scope) -> None:
        """Run the application on one request, until it ends or is cut off."""
        task = asyncio.current_task()
        assert task is not None and self.main is not None
        self._running.add(task)
        try:
            await self.main(scope, watch.receive, watch.send)
            if watch.died:
                raise EngineDiedError("the engine has died; this server is going down")
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            task.uncancel()
            await watch.cut_off()
        finally:
            self._running.discard(task)

    async def _body(self, outcome: Outcome, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """The body; None: the client left, or got its answer."""
        limit = self._rules.max_body_bytes
        try:
            with self._admission.receiving():
                async with asyncio.timeout(self._rules.body_s):
                    body = await _read_body(Request(scope, receive), limit)
        except TimeoutError:
            outcome.code, message = "408", f"the body did not arrive within {self._rules.body_s:g} s"
        else:
            if body is None:
                outcome.cancelled = True
                return None
            if len(body) <= limit:
                return body
            outcome.code, message = "413", f"the request body is over {limit} bytes"
        await error_response(int(outcome.code), message)(scope, receive, send)
        return None


class _Watch:
    """Stands between an application and its client: replays the body, records the status, and a client leaving."""

    def __init__(
        self, outcome: Outcome, body: bytes, receive: Receive, send: Send, engine_died: Callable[[], bool]
    ) -> None:
        self._outcome, self._receive, self._send, self._engine_died = outcome, receive, send, engine_died
        self._body: bytes | None = body
        self._started = self._finished = self._streams = False
        self.died = False
        """Whether the application answered with an error because the engine has died; the client has heard nothing."""

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
            self.died = message["status"] >= 500 and message["status"] != 503 and self._engine_died()
            if self.died:
                return
            headers = MutableHeaders(scope=message)
            self._outcome.code, self._started = str(message["status"]), True
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
            if message["status"] in (429, 503):
                headers.setdefault("retry-after", f"{_RETRY_S:.0f}")
        elif self.died:
            return
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
        await self._send(message)

    async def cut_off(self) -> None:
        """End the answer, as far as it has got."""
        error = UnavailableError("the server is going down, and this request took longer than it waits for")
        if not self._started:
            await refusal(error)({"type": "http", "method": "POST"}, self._receive, self.send)
        elif self._streams and not self._finished:
            said = json.dumps({"error": _content(503, str(error))})
            last = f"data: {said}\n\ndata: [DONE]\n\n".encode()
            await self.send({"type": "http.response.body", "body": last})


def _request_id(scope: Scope) -> str:
    """The client's id for this request, or a new one, which is put into the request. Raises `BadRequestError`."""
    given = Headers(scope=scope).get(REQUEST_ID)
    if given is not None:
        check_request_id("the header X-Request-Id", given)
        return given
    id_ = new_id()
    scope["headers"].append((REQUEST_ID.encode(), id_.encode()))
    return id_


def new_id() -> str:
    """An id for a request that has none."""
    return secrets.token_hex(16)


def with_id(send: Send, id_: str) -> Send:
    """`send` with the id in the header of the answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[REQUEST_ID] = id_
        await send(message)

    return sending


def _content(status: int, message: str) -> dict[str, object]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": status}


def error_response(status: int, message: str, retry_s: float | None = None) -> JSONResponse:
    """An answer in the shape of the OpenAI API's errors. It closes: a refused body may not have been read."""
    headers = {"connection": "close"}
    if retry_s is not None:
        headers["retry-after"] = str(max(1, round(retry_s)))
    return JSONResponse({"error": _content(status, message)}, status, headers)


def refusal(error: ServeError) -> JSONResponse:
    """The answer to a request that ends in `error`."""
    reply = answer(error)
    response = error_response(reply.http_status, reply.message, reply.retry_s)
    if isinstance(error, UnauthenticatedError):
        response.headers["www-authenticate"] = "Bearer"
    return response


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
