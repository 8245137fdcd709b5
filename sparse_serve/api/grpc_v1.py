"""The gRPC API: the services of `sparse_serve.v1`, with health checking and reflection.

The port is bound before the engine loads, and not shared: gRPC would by default let a second server bind the same port
and split the connections between the two. From the first moment health checks answer NOT_SERVING and calls UNAVAILABLE.

`grpc.health.v1` knows `""` (the whole server) and the full names of the services. All mean readiness, as clients and
orchestrators that do not name a service want to know whether to send requests here.

When a client cancels or its deadline passes, gRPC cancels the task that runs the call; that closes the engine's
iteration, which aborts the request in the engine.
"""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sparse_serve.api import grpc_admin, grpc_chat, grpc_smg, grpc_tokens
from sparse_serve.api import grpc_messages as messages
from sparse_serve.api.grpc_access import DecodeCheck, KeyCheck, server_credentials
from sparse_serve.api.grpc_admin import AdminService
from sparse_serve.api.grpc_calls import Calls
from sparse_serve.api.grpc_chat import ChatService
from sparse_serve.api.grpc_smg import VllmEngineService
from sparse_serve.api.grpc_standard import HealthService, add_reflection
from sparse_serve.api.grpc_tokens import TokenService
from sparse_serve.api.pb.v1 import admin_pb2_grpc, chat_pb2_grpc, generation_pb2_grpc, tokens_pb2_grpc
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine import Chunk, Origin
from sparse_serve.runtime.errors import PortInUseError
from sparse_serve.server.context import ServerContext

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
SERVICES = (SERVICE, grpc_chat.SERVICE, grpc_tokens.SERVICE)
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
        self._health = HealthService()
        self._calls = Calls(context)
        self._services: tuple[str, ...] = SERVICES
        self._smg: VllmEngineService | None = None

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
        admission, admin_keys = self._context.admission, self._context.admin_keys
        extra = {grpc_admin.SERVICE: admin_keys is not None, grpc_smg.SERVICE: settings.smg}
        self._services = (*SERVICES, *(service for service, wanted in extra.items() if wanted))
        interceptors = [
            KeyCheck(self._context.keys, {grpc_admin.SERVICE: admin_keys}, admission),
            DecodeCheck(self._services, admission),
        ]
        server = grpc.aio.server(options=options, interceptors=interceptors)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(self._calls), server)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(ChatService(self._calls), server)
        tokens_pb2_grpc.add_TokenServiceServicer_to_server(TokenService(self._calls), server)
        if admin_keys is not None:
            admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(self._calls), server)
        if settings.smg:
            self._smg = VllmEngineService(self._calls)
            self._smg.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            add_reflection(self._services, server)
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
        if self._smg is not None:
            self._smg.connect()
        self._calls.watch_writes()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Health checks turn to NOT_SERVING for good."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Running calls get `grace_s` seconds; then they are cancelled, as are health watches."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        self._calls.close()
        await self._server.stop(max(grace_s, _CLOSE_S))

    async def _set_health(self, status: Any) -> None:
        for service in ("", *self._services):
            await self._health.set(service, status)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """The calls of `proto/sparse_serve/v1/generation.proto`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Generate(self, request: pb.GenerateRequest, call: Any) -> pb.GenerateResponse:
        """All of it at once."""
        async with self._calls.answering("Generate", call) as answering:
            chunks = [chunk async for chunk in self._generate(request, call, answering.origin)]
            whole = messages.whole_response(chunks, request.sampling.n or 1)
        return whole  # noqa: RET504  what goes wrong while it is made is answered, too

    async def GenerateStream(self, request: pb.GenerateStreamRequest, call: Any) -> None:
        """Message by message."""
        async with (
            self._calls.answering("GenerateStream", call) as answering,
            contextlib.aclosing(self._generate(request, call, answering.origin)) as chunks,
        ):
            async for chunk in chunks:
                await self._calls.write(answering, messages.stream_response(chunk))

    async def ListModels(self, request: pb.ListModelsRequest, call: Any) -> pb.ListModelsResponse:
        """Names of models."""
        async with self._calls.answering("ListModels", call):
            self._calls.context.served()
            engine = self._calls.context.engine
        return messages.model_list(engine.models, engine.adapters)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, call: Any) -> pb.GetModelInfoResponse:
        """What is served."""
        async with self._calls.answering("GetModelInfo", call):
            info = self._calls.context.served()
        return messages.model_info(info, self._calls.context.engine.models)

    async def _generate(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest, call: Any, origin: Origin
    ) -> AsyncGenerator[Chunk, None]:
        context = self._calls.context
        info, engine = context.generating(), context.engine
        checked = replace(messages.read_request(request, info, engine.models, context.settings), origin=origin)
        with self._calls.share(call, checked.sampling.n):
            async with contextlib.aclosing(engine.generate(checked)) as chunks:
                async for chunk in chunks:
                    yield chunk
