"""What HTTP clients are answered: errors in the shape of the OpenAI API's, and the watch over an answer in the making.

An answer that is cut off at the end of a drain says so: with 503, or in the last event of a stream. When the engine has
died, that is the answer, whatever status or event the application found for it.
"""

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from sparse_serve.runtime.errors import (
    AbortedError,
    EngineDiedError,
    ServeError,
    UnauthenticatedError,
    UnavailableError,
    answer,
)
from sparse_serve.server.admission import Cause, Outcome

REQUEST_ID = "x-request-id"
UNREAD = "sparse_serve.unread"
"""In the scope of a request whose connection was closed because its answer was not read."""
_ERROR_EVENTS = (b'data: {"error"', b"event: error\n", b"event: response.failed\n")
"""How the event begins that tells of an error in the middle of a stream: of vLLM, and of responses, whose events have
names (https://platform.openai.com/docs/api-reference/responses-streaming)."""
_MESSAGE = re.compile(rb'("message": ?)"(?:[^"\\]|\\.)*"')
_RETRY_S = 1.0


class Watch:
    """Stands between an application and its client: replays the body, puts the request's id into the answer's header,
    and records its status, a client leaving, and an answer without an end. `headers` go with every answer that does
    not have them."""

    def __init__(
        self,
        outcome: Outcome,
        scope: Scope,
        receive: Receive,
        send: Send,
        died: Callable[[], bool],
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._outcome, self._scope, self._receive, self._send, self._died = outcome, scope, receive, send, died
        self._headers = headers
        self.body: bytes | None = None
        """The body of the request, where it was read already."""
        self._started = self._finished = self._streams = False
        self._swallows = False

    async def receive(self) -> Message:
        """What the client sends, from the body on."""
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._finished:
            self._outcome.cancelled = True
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer."""
        if message["type"] == "http.response.start":
            self._swallows = message["status"] >= 500 and message["status"] != 503 and self._died()
            if self._swallows:
                return
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self._outcome.id
            for name, value in self._headers.items():
                headers.setdefault(name, value)
            self._outcome.code, self._started = str(message["status"]), True
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
            if message["status"] in (429, 503):
                headers.setdefault("retry-after", f"{_RETRY_S:.0f}")
        elif self._swallows:
            return
        elif message["type"] == "http.response.body":
            if self._streams and message.get("body", b"").startswith(_ERROR_EVENTS):
                self._outcome.truncated = Cause.ENGINE if self._died() else Cause.ERROR
                if self._outcome.truncated is Cause.ENGINE:
                    message = {**message, "body": _of_death(message["body"])}
            self._finished |= not message.get("more_body", False)
        await self._send(message)

    async def cut_off(self, cause: Cause, error: ServeError) -> None:
        """End the answer with an error, as far as it has got."""
        if not self._started:
            self._swallows = False
            await refusal(error)({"type": "http", "method": "POST"}, self._receive, self.send)
        elif not self._finished:
            self._outcome.truncated = cause
            if self._streams:
                await self._send({"type": "http.response.body", "body": _event(error) + b"data: [DONE]\n\n"})

    def end(self) -> None:
        """The application is done. Raises `EngineDiedError` if its answer was that; the client has heard nothing."""
        if self._swallows:
            raise _dead()

    def record_end(self) -> None:
        """Note how an answer ended that has no end."""
        if self._started and not self._finished and self._outcome.truncated is None:
            left = Cause.CLIENT if self._outcome.cancelled else Cause.ERROR
            self._outcome.truncated = Cause.UNREAD if UNREAD in self._scope else left


def going_down() -> ServeError:
    """What those are told who wait when the drain is over."""
    return UnavailableError("the server is going down, and this request took longer than it waits for")


def _dead() -> EngineDiedError:
    return EngineDiedError("the engine has died; this server is going down")


def _event(error: ServeError) -> bytes:
    """The event of a stream that tells of an error."""
    return b"data: %s\n\n" % json.dumps({"error": _content(answer(error).http_status, str(error))}).encode()


def _of_death(event: bytes) -> bytes:
    """An event of vLLM, which sends the client to a stack trace, in our words; events with a name keep their form."""
    if event.startswith(_ERROR_EVENTS[0]):
        return _event(_dead())
    return _MESSAGE.sub(rb"\g<1>%s" % json.dumps(str(_dead())).encode(), event)


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
    if isinstance(error, AbortedError):  # OpenAI's clients try again after 409
        response.headers["x-should-retry"] = "false"
    return response
