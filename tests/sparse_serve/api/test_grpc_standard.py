"""Health checks and reflection as tools use them: grpcurl lists, describes, and makes a call out of what it read."""

from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from sparse_serve.api.grpc_v1 import SERVICES
from tests.sparse_serve.running import Running, running

VERSIONS = ("grpc.reflection.v1", "grpc.reflection.v1alpha")
STATUS = health_pb2.HealthCheckResponse


async def asked(server: Running, version: str, **question: Any) -> reflection_pb2.ServerReflectionResponse:
    ask = server.channel.stream_stream(
        f"/{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = [answer async for answer in ask(iter([reflection_pb2.ServerReflectionRequest(**question)]))]
    return answer


async def described(server: Running, version: str, name: str) -> Any:
    """The service of this name, from nothing but what reflection says."""
    pool, files = descriptor_pool.DescriptorPool(), {}

    def take(answer: reflection_pb2.ServerReflectionResponse) -> list[str]:
        found = [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_response.file_descriptor_proto]
        files.update((file.name, file) for file in found)
        return [file.name for file in found]

    async def add(file: str) -> None:
        if file not in files:
            take(await asked(server, version, file_by_filename=file))
        for other in files[file].dependency:
            await add(other)
        pool.Add(files[file])

    await add(take(await asked(server, version, file_containing_symbol=name))[0])
    return pool.FindServiceByName(name)


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_listed_service_is_described_and_has_its_methods(version: str) -> None:
    async with running() as server:
        listing = await asked(server, version, list_services="")
        names = {service.name for service in listing.list_services_response.service}
        assert names == {*SERVICES, "grpc.health.v1.Health", *(f"{other}.ServerReflection" for other in VERSIONS)}
        for name in names:
            service = await described(server, version, name)
            for method in service.methods:
                assert method.input_type.full_name.startswith(name.rpartition(".")[0])


async def test_a_call_made_of_what_reflection_v1_says_of_itself_is_answered() -> None:
    async with running() as server:
        (method,) = (await described(server, VERSIONS[0], f"{VERSIONS[0]}.ServerReflection")).methods
        asks, says = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        ask = server.channel.stream_stream(
            f"/{method.containing_service.full_name}/{method.name}", asks.SerializeToString, says.FromString
        )
        (answer,) = [answer async for answer in ask(iter([asks(list_services="")]))]
    assert answer.DESCRIPTOR.full_name == f"{VERSIONS[0]}.ServerReflectionResponse"
    assert len(answer.list_services_response.service) == len(SERVICES) + 3


async def test_health_lists_every_service_with_its_status() -> None:
    async with running() as server:
        stub = health_pb2_grpc.HealthStub(server.channel)
        listed = (await stub.List(health_pb2.HealthListRequest())).statuses
        assert {name: entry.status for name, entry in listed.items()} == dict.fromkeys(("", *SERVICES), STATUS.SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
