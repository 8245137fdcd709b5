"""Stands before every HTTP application: who may come in, where to, with what, and how an answer ends.

In this order: the request's id (the client's, from `X-Request-Id`, or a new one; the answer has it too, and so has
vLLM), the key, the path, and for all but GET and HEAD whether requests are taken, the body with its limits in bytes,
time and content, and the share of one client. What fails is answered here (`answers`). Every request is counted.

A browser asks before its first request whether a page may make it (CORS), and cannot send a key with that: such a
question is answered without one, in every phase, by `--allowed-origins` of vLLM. Refusals have such headers (`cors`).

The body is read before the application sees the request: a limit that strikes in the middle of somebody else's parser
would be answered with whatever that parser makes of it.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from sparse_serve.runtime.errors import AbortedError, ServeError
from sparse_serve.server.admission import Admission, Cause, Outcome, Phase
from sparse_serve.server.answers import REQUEST_ID, Watch, error_response, going_down, refusal
from sparse_serve.server.body_limits import BodyLimits, check_request_id
from sparse_serve.server.cors import Cors
from sparse_serve.server.keys import Keys

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
_SAFE = ("GET", "HEAD")
_METRICS = "/metrics"
_LOOK_S = 0.1
_WORK = "/v1/"
"""What is below tells about requests, and a drain waits for it; elsewhere GET tells about the server."""
_MAX_OTHER_BYTES = 1 << 20
"""Elsewhere are `/tokenize` and others of `--extra-routes`, where vLLM has no limit of its own: 8 MB of text are tokens
for 15 s, and 22 MB of answer."""


@dataclass(frozen=True)
class Rules:
    """What the gatekeeper goes by. `serves` says whether there is something at a path."""

    max_body_bytes: int
    body_s: float
    limits: BodyLimits
    keys: Keys | None
    serves: Callable[[str], bool]


class Gatekeeper:
    """An application around mounted ones, and around `main`, which is None while the model loads. `died` says whether
    the engine has, `cors` which pages may read an answer, once that is known."""

    def __init__(self, admission: Admission, rules: Rules, died: Callable[[], bool]) -> None:
        self.main: ASGIApp | None = None
        self.cors: Callable[[], Cors | None] = lambda: None
        self._admission, self._rules, self._died = admission, rules, died
        self._mounted: dict[str, tuple[ASGIApp, bool]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._cutting: Cause | None = None

    def mount(self, path: str, app: ASGIApp, needs_key: bool) -> None:
        """Answer exactly this path with `app`, in every phase, to those with a key or to everybody."""
        self._mounted[path] = (app, needs_key)

    def cors_headers(self, request: Headers) -> Mapping[str, str]:
        """What a browser has to be told with the answer to a request with these headers."""
        cors = self.cors()
        return {} if cors is None else cors.headers(request)

    def cut_off(self) -> None:
        """End every request that is being answered, with an error."""
        self._cutting = Cause.ENGINE if self._admission.phase is Phase.DEAD else Cause.DRAIN
        for task in self._running:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or a websocket's handshake."""
        if scope["type"] != "http":
            await WebSocketClose(code=1008)(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        tells = path in self._mounted or _is_preflight(scope)
        holds_drain = not tells and (method not in _SAFE or path.startswith(_WORK))
        with self._admission.request("http", method if method in _METHODS else "other", holds_drain) as outcome:
            outcome.code, outcome.id = "none", new_id()
            watch = Watch(outcome, scope, receive, send, self._died, self.cors_headers(Headers(scope=scope)))
            try:
                await self._answer(watch, outcome, scope, receive)
                watch.end()
            except ServeError as error:
                await refusal(error)(scope, receive, watch.send)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not outcome.aborted or task is None:
                    raise
                task.uncancel()
                await watch.cut_off(Cause.ABORTED, AbortedError("an operator ended this request"))
            finally:
                watch.record_end()

    async def _answer(self, watch: Watch, outcome: Outcome, scope: Scope, receive: Receive) -> None:
        """Answer a request. Raises what it is refused with."""
        path = scope["path"]
        if _is_preflight(scope):
            await self._answer_preflight(watch, scope, receive)
            return
        if path in self._mounted:
            app, needs_key = self._mounted[path]
            outcome.client = self.client(scope) if needs_key else ""
            await app(scope, receive, watch.send)
            return
        outcome.id = _request_id(scope, outcome.id)
        outcome.client = self.client(scope)
        if not self._rules.serves(path):
            await _nothing(path)(scope, receive, watch.send)
            return
        is_safe = scope["method"] in _SAFE
        is_readable = is_safe and (self._admission.phase is not Phase.DEAD or path == _METRICS)
        if self.main is None or not is_readable:
            self._admission.check()
        if is_safe:
            await self._run(watch, scope)
        elif await self._read_body(watch, outcome, scope, receive):
            self._admission.check()
            assert watch.body is not None
            with self._admission.share(outcome.client, self._rules.limits.check(watch.body)):
                await self._run(watch, scope)

    async def _answer_preflight(self, watch: Watch, scope: Scope, receive: Receive) -> None:
        """Say what a page may do. Waits while the server starts and does not know yet."""
        path = scope["path"]
        if path not in self._mounted and not self._rules.serves(path):
            await _nothing(path)(scope, receive, watch.send)
            return
        while (cors := self.cors()) is None and self._admission.phase is Phase.STARTING:
            await asyncio.sleep(_LOOK_S)
        answer = (cors or Cors(())).preflight(Headers(scope=scope))
        await answer(scope, receive, watch.send)

    def client(self, scope: Scope) -> str:
        """Who asks: the owner of a key, or without keys, a connection. Raises `UnauthenticatedError`."""
        if self._rules.keys is not None:
            return self._rules.keys.client(Headers(scope=scope).get("authorization"))
        host, port = scope.get("client") or ("", 0)
        return f"{host}:{port}"

    async def _run(self, watch: Watch, scope: Scope) -> None:
        """Run the application on one request, until it ends or is cut off."""
        task = asyncio.current_task()
        assert task is not None and self.main is not None
        self._running.add(task)
        try:
            await self.main(scope, watch.receive, watch.send)
        except asyncio.CancelledError:
            if self._cutting is None:  # the client's connection, or an operator
                raise
            task.uncancel()
            await watch.cut_off(self._cutting, going_down())
        finally:
            self._running.discard(task)

    async def _read_body(self, watch: Watch, outcome: Outcome, scope: Scope, receive: Receive) -> bool:
        """Give the body to `watch`. False: the client left, or got its answer."""
        limit = self._rules.max_body_bytes
        if not scope["path"].startswith(_WORK):
            limit = min(limit, _MAX_OTHER_BYTES)
        try:
            with self._admission.receiving():
                async with asyncio.timeout(self._rules.body_s):
                    watch.body = await _body(Request(scope, receive), limit)
        except TimeoutError:
            refused = error_response(408, f"the body did not arrive within {self._rules.body_s:g} s")
        else:
            if watch.body is None:
                outcome.cancelled = True
                return False
            if len(watch.body) <= limit:
                return True
            refused = error_response(413, f"the request body is over {limit} bytes")
        await refused(scope, receive, watch.send)
        return False


def _nothing(path: str) -> Response:
    return error_response(404, f"there is nothing at {path}")


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what a page may do (https://fetch.spec.whatwg.org/#cors-preflight-request)."""
    headers = Headers(scope=scope)
    return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _request_id(scope: Scope, new: str) -> str:
    """The client's id for this request, or the new one, which is put into the request. Raises `BadRequestError`."""
    given = Headers(scope=scope).get(REQUEST_ID)
    if given is not None:
        check_request_id("the header X-Request-Id", given)
        return given
    scope["headers"].append((REQUEST_ID.encode(), new.encode()))
    return new


def new_id() -> str:
    """An id for a request that has none."""
    return secrets.token_hex(16)


async def _body(request: Request, limit_bytes: int) -> bytes | None:
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
