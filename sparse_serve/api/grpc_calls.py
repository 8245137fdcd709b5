"""What every gRPC call of ours goes through: admission, the share of its client, the status of its exception.

A client that leaves, or does not read for `write_s`, ends its call as CANCELLED.

The W3C trace context of a call, its metadata `traceparent` and `tracestate`, goes on to the engine
(https://www.w3.org/TR/trace-context/).
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from sparse_serve.api.grpc_access import authorization
from sparse_serve.api.grpc_status import REQUEST_ID, abort, metadata_value, new_id, request_id
from sparse_serve.engine import NOBODY, Origin
from sparse_serve.runtime.errors import AbortedError, EngineDiedError, answer
from sparse_serve.server.admission import Cause, Outcome, Phase
from sparse_serve.server.body_limits import check_request_id
from sparse_serve.server.context import ServerContext

_TRACE_PARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_MAX_TRACE_STATE = 512


@dataclass
class Answering:
    """A call that is being answered. `begun`: whether it is a stream of which a message has been sent."""

    call: Any
    outcome: Outcome
    origin: Origin = NOBODY
    begun: bool = False


class Calls:
    """The calls of one server. `watch_writes` when it takes requests, `close` when it ends."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self._stopping = False
        self._writing: dict[asyncio.Task[Any], float] = {}
        self._unread: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.Task[None] | None = None

    def watch_writes(self) -> None:
        """From now on, end the calls of clients that do not read."""
        self._watch = asyncio.create_task(self._end_unread())

    def close(self) -> None:
        """What is cancelled from now on is so because this server ends."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()

    async def _end_unread(self) -> None:
        limit_s = self.context.settings.write_s
        while True:
            await asyncio.sleep(min(limit_s / 4, 1.0))
            for task, since_s in list(self._writing.items()):
                if time.monotonic() - since_s > limit_s:
                    self._unread.add(task)
                    task.cancel()

    async def write(self, answering: Answering, message: Any) -> None:
        """Send one message of a stream."""
        task = asyncio.current_task()
        assert task is not None
        self._writing[task] = time.monotonic()
        try:
            await answering.call.write(message)
            answering.begun = True
        finally:
            del self._writing[task]

    def client(self, call: Any) -> str:
        """Who calls: the owner of a key, or without keys, a connection."""
        keys = self.context.keys
        return str(call.peer()) if keys is None else keys.client(authorization(call.invocation_metadata()))

    @contextlib.contextmanager
    def share(self, call: Any, sequences: int) -> Iterator[None]:
        """Take `sequences` of what the client may have running. Raises `TooManyError`."""
        with self.context.admission.share(self.client(call), sequences):
            yield

    @contextlib.asynccontextmanager
    async def answering(
        self, method: str, call: Any, client: str = "", given_id: str = "", holds_drain: bool = True
    ) -> AsyncIterator[Answering]:
        """Count a call, and end it with the status its exception stands for. It has an id: the client's own, from the
        metadata `x-request-id`, or a new one. The answer's trailing metadata has it, too. `client`: who calls, if
        that is not for a client's key to say; `given_id`: the client's id, where it is in the request itself."""
        with self.context.admission.request("grpc", method, holds_drain) as outcome:
            answering = Answering(call, outcome)
            outcome.id = new_id()
            try:
                outcome.client, outcome.id = client or self.client(call), request_id(call, outcome.id)
                if given_id:
                    check_request_id("request_id", given_id)
                    outcome.id = given_id
                answering.origin = Origin(outcome.id, _trace(call))
                call.set_trailing_metadata(((REQUEST_ID, outcome.id),))
                yield answering
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not outcome.aborted or task is None:
                    self._cancelled(answering)
                    raise
                task.uncancel()
                await self._failed(answering, AbortedError("an operator ended this request"))
            except grpc.aio.BaseError:  # a write to a client that has left
                self._cancelled(answering)
            except Exception as error:
                await self._failed(answering, error)

    async def _failed(self, answering: Answering, error: Exception) -> None:
        """End a call with the status that an exception stands for."""
        outcome, reply = answering.outcome, answer(error)
        if answering.begun:
            causes: dict[type[Exception], Cause] = {EngineDiedError: Cause.ENGINE, AbortedError: Cause.ABORTED}
            outcome.truncated = causes.get(type(error), Cause.ERROR)
        outcome.code = reply.grpc_code
        await abort(answering.call, error, outcome.id, reply)

    def _cancelled(self, answering: Answering) -> None:
        """Note why a call was cancelled."""
        outcome, remaining_s = answering.outcome, answering.call.time_remaining()
        task = asyncio.current_task()
        if self._stopping:
            dead = self.context.admission.phase is Phase.DEAD
            outcome.code, cause = "UNAVAILABLE", Cause.ENGINE if dead else Cause.DRAIN
        elif task in self._unread:
            outcome.cancelled, outcome.code, cause = True, "CANCELLED", Cause.UNREAD
        elif remaining_s is not None and remaining_s <= 0:
            outcome.cancelled, outcome.code, cause = True, "DEADLINE_EXCEEDED", Cause.DEADLINE
        else:
            outcome.cancelled, outcome.code, cause = True, "CANCELLED", Cause.CLIENT
        self._unread.discard(task)
        if answering.begun:
            outcome.truncated = cause


def _trace(call: Any) -> dict[str, str]:
    """The trace context of a call; none if it is not what the standard says, as that has it."""
    parent, state = metadata_value(call, "traceparent"), metadata_value(call, "tracestate")
    if not isinstance(parent, str) or not _TRACE_PARENT.fullmatch(parent):
        return {}
    is_state = isinstance(state, str) and len(state) <= _MAX_TRACE_STATE
    return {"traceparent": parent} | ({"tracestate": state} if is_state else {})
