"""Who may call over gRPC: keys as an interceptor, TLS as credentials, both read again when their files change."""

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health

from sparse_serve.api.grpc_status import refuse
from sparse_serve.runtime.errors import BadRequestError, ServeError, UnauthenticatedError
from sparse_serve.server.admission import Admission
from sparse_serve.server.keys import Keys
from sparse_serve.server.tls import Tls


def server_credentials(tls: Tls) -> Any:
    """Credentials of a gRPC server, which looks at the files at every handshake."""

    def fetch() -> Any:
        tls.refresh()
        return _configuration(tls)

    return grpc.dynamic_ssl_server_credentials(_configuration(tls), fetch, tls.files.client_ca is not None)


def _configuration(tls: Tls) -> Any:
    certificate, key, client_ca = tls.contents
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)


class KeyCheck(grpc.aio.ServerInterceptor):
    """Refuses every call without a key. `others` are services with keys of their own, None where they need none."""

    def __init__(self, keys: Keys | None, others: Mapping[str, Keys | None], admission: Admission) -> None:
        self._keys, self._admission = keys, admission
        self._others = {health.SERVICE_NAME: None, **others}

    async def intercept_service(self, continuation: Any, call_details: Any) -> Any:
        """The handler of a call, or one that refuses it."""
        handler = await continuation(call_details)
        service = call_details.method.removeprefix("/").rpartition("/")[0]
        keys = self._others.get(service, self._keys)
        if handler is None or keys is None:
            return handler
        try:
            keys.client(authorization(call_details.invocation_metadata))
        except UnauthenticatedError as error:
            return _refusing(handler, self._admission, call_details.method, error)
        return handler


def _refusing(handler: Any, admission: Admission, path: str, error: ServeError) -> Any:
    """A handler of the same kind (unary or streaming) as `handler` that ends calls with `error`."""

    async def whole(request: Any, call: Any) -> None:
        await refuse(admission, path, call, error)

    async def stream(request: Any, call: Any) -> AsyncGenerator[None, None]:
        await refuse(admission, path, call, error)
        yield

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, whole),
        (False, True): (grpc.unary_stream_rpc_method_handler, stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, whole),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream),
    }
    make, function = kinds[handler.request_streaming, handler.response_streaming]
    return make(function, handler.request_deserializer, handler.response_serializer)


def authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The `authorization` of a call, from its metadata."""
    found = (value for name, value in metadata or () if name.lower() == "authorization" and isinstance(value, str))
    return next(found, None)


_CORRUPT = object()
"""In place of a request whose bytes are none."""


class DecodeCheck(grpc.aio.ServerInterceptor):
    """Ends calls whose bytes are no message with INVALID_ARGUMENT, where gRPC says UNKNOWN and shows an exception."""

    def __init__(self, services: Iterable[str], admission: Admission) -> None:
        self._services = tuple(f"/{service}/" for service in services)
        self._admission = admission

    async def intercept_service(self, continuation: Any, call_details: Any) -> Any:
        """The handler of a call, which looks at its request first."""
        handler = await continuation(call_details)
        if handler is None or not call_details.method.startswith(self._services):
            return handler
        is_stream = handler.response_streaming
        behaviour, read = handler.unary_stream if is_stream else handler.unary_unary, handler.request_deserializer

        def decode(data: bytes) -> Any:
            try:
                return read(data)
            except DecodeError:
                return _CORRUPT

        async def checked(request: Any, call: Any) -> Any:
            if request is _CORRUPT:
                error = BadRequestError("the bytes of the request are no such message")
                await refuse(self._admission, call_details.method, call, error)
            return await behaviour(request, call)

        make = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
        return make(checked, decode, handler.response_serializer)
