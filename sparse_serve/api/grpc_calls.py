"""What every gRPC call of ours goes through: admission, the share of its client, the status of its exception.

A status carries details (google.rpc): `ErrorInfo` with a reason that does not change with its wording, `BadRequest`
with the field that is wrong, `RetryInfo` where trying again makes sense; clients may take its absence for "do not".

A client that leaves, or does not read for `write_s`, ends its call as CANCELLED.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from sparse_serve.api.grpc_access import authorization
from sparse_serve.runtime.errors import Answer, BadRequestError, answer
from sparse_serve.server.body_limits import check_request_id
from sparse_serve.server.context import ServerContext

DOMAIN = "sparse-serve"
REQUEST_ID = "x-request-id"


class Calls:
    """The calls of one server. `watch_writes` when it takes requests, `close` when it ends."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self._stopping = False
        self._writing: dict[asyncio.Task[Any], float] = {}
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
                    task.cancel()

    async def write(self, call: Any, message: Any) -> None:
        """Send one message of a stream."""
        task = asyncio.current_task()
        assert task is not None
        self._writing[task] = time.monotonic()
        try:
            await call.write(message)
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
    async def answering(self, method: str, call: Any) -> AsyncIterator[str]:
        """Count a call, and end it with the status its exception stands for. Gives its id: the client's own, from the
        metadata `x-request-id`, or a new one. The answer's trailing metadata has it, too."""
        with self.context.admission.request("grpc", method) as outcome:
            try:
                outcome.client, outcome.id = self.client(call), _request_id(call)
                call.set_trailing_metadata(((REQUEST_ID, outcome.id),))
                yield outcome.id
            except asyncio.CancelledError:
                outcome.cancelled = not self._stopping
                outcome.code = "CANCELLED" if outcome.cancelled else "UNAVAILABLE"
                raise
            except grpc.aio.BaseError:  # a write to a client that has left
                outcome.cancelled, outcome.code = True, "CANCELLED"
            except Exception as error:
                reply = answer(error)
                outcome.code = reply.grpc_code
                code = grpc.StatusCode[reply.grpc_code]
                metadata = (*_details(code, reply, error), (REQUEST_ID, outcome.id))
                await call.abort(code, reply.message, trailing_metadata=metadata)


def _request_id(call: Any) -> str:
    """Raises `BadRequestError` for an id of a client that is none."""
    given = next((value for name, value in call.invocation_metadata() or () if name == REQUEST_ID), None)
    if given is None:
        return secrets.token_hex(16)
    check_request_id(f"the metadata {REQUEST_ID}", given)
    return str(given)


def _details(code: grpc.StatusCode, reply: Answer, error: Exception) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries the details."""
    reason = type(error).__name__ if reply.grpc_code != "INTERNAL" else "InternalError"
    details: list[Any] = []
    if reply.retry_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(reply.retry_s * 1000))
        details.append(retry)
    if isinstance(error, BadRequestError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=reply.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    details.append(error_details_pb2.ErrorInfo(reason=_upper(reason), domain=DOMAIN))
    status = status_pb2.Status(code=code.value[0], message=reply.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return (("grpc-status-details-bin", status.SerializeToString()),)


def _upper(name: str) -> str:
    """`BadRequestError` as `BAD_REQUEST`."""
    words = "".join(f"_{letter}" if letter.isupper() else letter for letter in name.removesuffix("Error"))
    return words.removeprefix("_").upper()
