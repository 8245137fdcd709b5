"""Where a server is, how to get in, when to try again, and what a call that failed says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from sparse_serve.api.pb.v1 import chat_pb2, generation_pb2, tokens_pb2
from sparse_serve.runtime.errors import ServeError

_SERVICES = [
    service.full_name
    for module in (generation_pb2, chat_pb2, tokens_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]


class CallError(ServeError, RuntimeError):
    """A call that failed: `code` as gRPC names it, such as "INVALID_ARGUMENT", and what the server says about it.

    `reason` is the server's own name for it (empty from other servers), `fields` are those of the request that are
    wrong, and `retry_s` is set where trying again makes sense.
    """

    def __init__(self, address: str, error: Any) -> None:
        self.code: str = error.code().name
        self.reason, self.fields, self.retry_s = "", [], None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                self._read(status_pb2.Status.FromString(value))
        super().__init__(f"{address}: {self.code}: {error.details()}")

    fields: list[str]
    retry_s: float | None

    def _read(self, status: Any) -> None:
        for detail in status.details:
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(info):
                self.reason = info.reason
            elif detail.Unpack(bad):
                self.fields = [violation.field for violation in bad.field_violations]
            elif detail.Unpack(retry):
                self.retry_s = retry.retry_delay.ToMilliseconds() / 1000


@dataclass(frozen=True)
class Tls:
    """PEM files: authorities of the server's certificate (None: the system's); a certificate to show, and its key."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """What a channel is made with. Raises `OSError` for a file that cannot be read."""
        ca, key, certificate = (
            None if path is None else path.read_bytes() for path in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True)
class Connection:
    """`address` is `HOST:PORT`. `key` is one of the server's. A call ends after `timeout_s` seconds."""

    address: str
    key: str | None = None
    tls: Tls | None = None
    timeout_s: float = 300.0
    attempts: int = 4

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What every call carries."""
        return [("authorization", f"Bearer {self.key}")] if self.key else []

    @property
    def options(self) -> list[tuple[str, Any]]:
        """Of the channel. gRPC itself makes the retries; it does not read a RetryInfo."""
        if self.attempts < 2:
            return [("grpc.enable_retries", 0)]
        policy = {
            "maxAttempts": min(self.attempts, 5),
            "initialBackoff": "0.5s",
            "maxBackoff": "10s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }
        config = {"methodConfig": [{"name": [{"service": name} for name in _SERVICES], "retryPolicy": policy}]}
        return [("grpc.service_config", json.dumps(config)), ("grpc.max_receive_message_length", -1)]
