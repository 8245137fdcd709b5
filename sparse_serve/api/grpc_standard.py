"""Services that tools expect of every gRPC server: health checks, and reflection under both of its names.

grpc-health-checking implements `Check` and `Watch` of grpc.health.v1; `List` is here
(https://github.com/grpc/grpc-proto/blob/master/grpc/health/v1/health.proto). grpcio-reflection has
`grpc.reflection.v1alpha` only; v1, which newer tools ask for first, has the same messages under another name.
"""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1ALPHA, _V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
REFLECTION_V1 = f"{_V1}.ServerReflection"
_FILE = "grpc/reflection/v1/reflection.proto"


class HealthService(health.aio.HealthServicer):
    """grpc.health.v1, whole."""

    async def List(self, request: Any, call: Any) -> Any:
        """The status of every service."""
        statuses = {
            service: health_pb2.HealthCheckResponse(status=status) for service, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)


def add_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Answer reflection about `services`, health and itself."""
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
    _describe_v1()
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(service_names=names).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(REFLECTION_V1, handlers),))


def _describe_v1() -> None:
    """Put the description of v1 where reflection looks for descriptions, unless it is there: v1alpha's, renamed."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileContainingSymbol(REFLECTION_V1)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        file.ClearField("options")
        text = text_format.MessageToString(file).replace(_V1ALPHA, _V1).replace(reflection_pb2.DESCRIPTOR.name, _FILE)
        pool.Add(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()))
