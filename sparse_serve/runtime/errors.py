"""Errors of the server, and the one table that turns an exception into an answer.

    SparseError (maskgen.core.errors)
     +-- ServeError
          +-- SettingsError     (ValueError)       a flag, an environment variable or a model path is wrong
          +-- PortInUseError    (OSError)          an address to listen on is taken or not ours
          +-- EngineStartError  (RuntimeError)     the engine did not come up, or not with what the checkpoint promises
          +-- KernelError       (RuntimeError)     no kernel can serve a layer, or the one asked for cannot
          +-- GateError         (RuntimeError)     the gate could not measure
          +-- BenchError        (RuntimeError)     a benchmark could not measure; the message has the end of a log
          +-- BadRequestError   (ValueError)       a request is wrong; the message names the field
          +-- UnknownModelError (LookupError)      a request asks for a model that is not the served one
          +-- UnauthenticatedError (PermissionError) a request has no key of this server
          +-- OverloadedError   (RuntimeError)     the queue is full
          |    +-- TooManyError                    this client has enough requests running
          +-- UnavailableError  (ConnectionError)  starting or draining: try again, or another replica
          +-- UnsupportedError  (NotImplementedError) this server, or its model, does not do that
          +-- AbortedError      (RuntimeError)     an operator ended this request
          +-- EngineDiedError   (RuntimeError)     the engine process is gone; this server is about to exit

`answer` picks the status of this project's errors, for gRPC calls and for what the HTTP listener refuses, so the same
error has the same meaning on each. The listener's 404 and 413 and the statuses of vLLM's own HTTP API do not come from
it. The text of an exception reaches a client only if it was written for clients, that is if the table has its
class. Anything else is logged under a random id, and the client gets the id: exception texts of libraries have carried
addresses and memory contents out of other servers.
"""

import logging
import secrets
from dataclasses import dataclass

from maskgen.core.errors import SparseError

logger = logging.getLogger(__name__)


class ServeError(SparseError):
    """Base of the server's own errors."""


class SettingsError(ServeError, ValueError):
    """A flag, an environment variable or a model path is wrong."""


class PortInUseError(ServeError, OSError):
    """An address to listen on is taken, or is not an address of this machine."""


class EngineStartError(ServeError, RuntimeError):
    """The engine did not come up, or came up with less than the checkpoint promises."""


class KernelError(ServeError, RuntimeError):
    """No kernel can serve a layer, or the one asked for cannot; the message holds every reason."""


class GateError(ServeError, RuntimeError):
    """The gate could not measure."""


class BenchError(ServeError, RuntimeError):
    """A benchmark could not measure; the message has the end of the log that says why."""


class BadRequestError(ServeError, ValueError):
    """A request is wrong. The message names the field, its value and what was expected; `field` is its name."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownModelError(ServeError, LookupError):
    """A request asks for a model that is not served here. The message names those that are."""


class OverloadedError(ServeError, RuntimeError):
    """The engine's queue is full."""


class TooManyError(OverloadedError):
    """One client has as many requests running as one may have."""


class UnauthenticatedError(ServeError, PermissionError):
    """A request has no key, or one that is not of this server."""


class UnavailableError(ServeError, ConnectionError):
    """The server is not taking requests now: it is starting or draining."""


class UnsupportedError(ServeError, NotImplementedError):
    """This server, or the model that it serves, does not do that."""


class AbortedError(ServeError, RuntimeError):
    """An operator ended this request."""


class EngineDiedError(ServeError, RuntimeError):
    """The engine process is gone. Nothing in this process can bring it back."""


@dataclass(frozen=True)
class Answer:
    """What a client is told. `retry_s` is set where trying again, here or on another replica, makes sense."""

    grpc_code: str
    http_status: int
    message: str
    retry_s: float | None = None


_TABLE: tuple[tuple[type[SparseError], str, int, float | None], ...] = (
    (BadRequestError, "INVALID_ARGUMENT", 400, None),
    (UnknownModelError, "NOT_FOUND", 404, None),
    (UnauthenticatedError, "UNAUTHENTICATED", 401, None),
    (TooManyError, "RESOURCE_EXHAUSTED", 429, 1.0),
    (OverloadedError, "RESOURCE_EXHAUSTED", 503, 1.0),
    (UnavailableError, "UNAVAILABLE", 503, 1.0),
    (UnsupportedError, "UNIMPLEMENTED", 501, None),
    (AbortedError, "ABORTED", 409, None),
    (EngineDiedError, "UNAVAILABLE", 503, 5.0),
)


def answer(error: Exception) -> Answer:
    """The answer to a request that ended in `error`. Unexpected errors are logged here, with their traceback."""
    for kind, grpc_code, http_status, retry_s in _TABLE:
        if isinstance(error, kind):
            return Answer(grpc_code, http_status, str(error), retry_s)
    error_id = secrets.token_hex(8)
    logger.error("error %s while answering a request", error_id, exc_info=error)
    return Answer("INTERNAL", 500, f"internal error {error_id}: the server's log has the details under this id")
