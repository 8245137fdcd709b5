"""The gRPC API: service `sparse_serve.v1.GenerationService`, with health checking and reflection.

The port is bound before the engine loads, and not shared: gRPC would by default let a second server bind the same port
and split the connections between the two. From the first moment health checks answer NOT_SERVING and calls UNAVAILABLE.

`grpc.health.v1` knows `""` (the whole server) and the full service name. Both mean readiness, as clients and
orchestrators that do not name a service want to know whether to send requests here.

When a client cancels or its deadline passes, gRPC cancels the task that runs the call; that closes the engine's
iteration, which aborts the request in the engine.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sparse_serve.api import grpc_messages as messages
from sparse_serve.api.grpc_access import KeyCheck, authorization, server_credentials
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.api.pb.v1 import generation_pb2_grpc
from sparse_serve.engine import Chunk
from sparse_serve.runtime.errors import Answer, PortInUseError, answer
from sparse_serve.server.context import ServerContext

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
_CLOSE_S = 0.5
_INT32_MAX = 2**31 - 1
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


def create(context: ServerContext) -> "GrpcApi":
    """The gRPC API, on a port of its own."""
    return GrpcApi(context)


class GrpcApi:
    """Implements `Api`."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._service = GenerationService(context)

    async def start(self) -> str:
        """Bind and answer NOT_SERVING / UNAVAILABLE. See `Api.start`."""
        settings = self._context.settings
        age_ms, grace_ms = round(settings.max_connection_age_s * 1000), round(settings.drain_s * 1000)
        options = [
            *_OPTIONS,
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_concurrent_streams", settings.max_streams),
            ("grpc.max_connection_age_ms", min(age_ms, _INT32_MAX)),
            ("grpc.max_connection_age_grace_ms", max(grace_ms, 1000)),
        ]
        interceptors = [KeyCheck(self._context.keys)] if self._context.keys else []
        server = grpc.aio.server(options=options, interceptors=interceptors)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            services = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(services, server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            address, tls = f"{host}:{settings.grpc_port}", self._context.tls
            if tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, server_credentials(tls))
        except RuntimeError:
            raise PortInUseError(
                f"gRPC address {host}:{settings.grpc_port}: taken, or not an address of this machine; "
                "choose another with --grpc-port (0: any free one)"
            ) from None
        self._server = server
        await server.start()
        return f"{host}:{port}"

    async def serve(self) -> None:
        """Health checks turn to SERVING; the calls ask `Admission`."""
        self._service.watch_writes()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Health checks turn to NOT_SERVING for good."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Running calls get `grace_s` seconds; then they are cancelled, as are health watches."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        self._service.close()
        await self._server.stop(max(grace_s, _CLOSE_S))

    async def _set_health(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """The calls of `proto/sparse_serve/v1/generation.proto`."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
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
        limit_s = self._context.settings.write_s
        while True:
            await asyncio.sleep(min(limit_s / 4, 1.0))
            for task, since_s in list(self._writing.items()):
                if time.monotonic() - since_s > limit_s:
                    task.cancel()

    async def Generate(self, request: pb.GenerateRequest, call: Any) -> pb.GenerateResponse:
        """All of it at once."""
        async with self._answering("Generate", call):
            chunks = [chunk async for chunk in self._generate(request, call)]
        return messages.whole_response(chunks)

    async def GenerateStream(self, request: pb.GenerateStreamRequest, call: Any) -> None:
        """Message by message."""
        async with (
            self._answering("GenerateStream", call),
            contextlib.aclosing(self._generate(request, call)) as chunks,
        ):
            task = asyncio.current_task()
            assert task is not None
            async for chunk in chunks:
                self._writing[task] = time.monotonic()
                try:
                    await call.write(messages.stream_response(chunk))
                finally:
                    del self._writing[task]

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, call: Any) -> pb.GetModelInfoResponse:
        """What is served."""
        async with self._answering("GetModelInfo", call):
            info = self._context.served()
        return messages.model_info(info, self._context.engine.models)

    async def _generate(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest, call: Any
    ) -> AsyncGenerator[Chunk, None]:
        info, engine = self._context.served(), self._context.engine
        checked = messages.read_request(request, info, engine.models, self._context.settings)
        with self._context.admission.share(self._client(call), 1):
            async with contextlib.aclosing(engine.generate(checked)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def _client(self, call: Any) -> str:
        """Who asks: the owner of a key, or without keys, a connection."""
        keys = self._context.keys
        return str(call.peer()) if keys is None else keys.client(authorization(call.invocation_metadata()))

    @contextlib.asynccontextmanager
    async def _answering(self, method: str, call: Any) -> AsyncIterator[None]:
        """Count a call, and end it with the status its exception stands for."""
        with self._context.admission.request("grpc", method) as outcome:
            try:
                yield
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
                await call.abort(code, reply.message, trailing_metadata=_details(code, reply))


def _details(code: grpc.StatusCode, reply: Answer) -> tuple[tuple[str, bytes], ...]:
    """google.rpc details: clients may treat a status without RetryInfo as "do not try again"."""
    if reply.retry_s is None:
        return ()
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(round(reply.retry_s * 1000))
    detail = AnyMessage()
    detail.Pack(retry)
    status = status_pb2.Status(code=code.value[0], message=reply.message, details=[detail])
    return (("grpc-status-details-bin", status.SerializeToString()),)
