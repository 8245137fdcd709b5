"""The service `sparse_serve.v1.AdminService`, which is there only with `--admin-keys`."""

import logging
import re
from typing import Any

from sparse_serve.api.grpc_calls import Calls
from sparse_serve.api.pb.v1 import admin_pb2 as pb
from sparse_serve.api.pb.v1 import admin_pb2_grpc
from sparse_serve.runtime.errors import BadRequestError
from sparse_serve.server.body_limits import check_request_id

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
_LEVELS = {
    pb.LOG_LEVEL_DEBUG: logging.DEBUG,
    pb.LOG_LEVEL_INFO: logging.INFO,
    pb.LOG_LEVEL_WARNING: logging.WARNING,
    pb.LOG_LEVEL_ERROR: logging.ERROR,
}
_LOGGER = re.compile(r"(sparse_serve|vllm)(\.\w+)*")


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The calls of `proto/sparse_serve/v1/admin.proto`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Abort(self, request: pb.AbortRequest, call: Any) -> pb.AbortResponse:
        """End requests by their id."""
        async with self._calls.answering("Abort", call, "operator"):
            check_request_id("request_id", request.request_id)
            ended = self._calls.context.admission.abort(request.request_id)
            logger.warning("an operator aborted %d requests with id %s", ended, request.request_id)
        return pb.AbortResponse(requests=ended)

    async def Drain(self, request: pb.DrainRequest, call: Any) -> pb.DrainResponse:
        """Begin to drain."""
        async with self._calls.answering("Drain", call, "operator"):
            logger.warning("an operator began to drain this server")
            context = self._calls.context
            running = context.admission.in_flight - 1  # without this call
            context.stop()
        return pb.DrainResponse(requests=running, limit_s=context.settings.drain_s)

    async def SetLogLevel(self, request: pb.SetLogLevelRequest, call: Any) -> pb.SetLogLevelResponse:
        """More of the log, or less."""
        async with self._calls.answering("SetLogLevel", call, "operator"):
            name = request.logger or "sparse_serve"
            known = name in logging.Logger.manager.loggerDict
            if not known or not _LOGGER.fullmatch(name):
                raise BadRequestError(
                    f"logger is {name[:80]!r}; expected sparse_serve, vllm, or a part of them that writes", "logger"
                )
            if request.level not in _LEVELS:
                raise BadRequestError(f"level is {request.level}; expected one of LogLevel but the first", "level")
            chosen = logging.getLogger(name)
            in_force = chosen.getEffectiveLevel()
            before = max((level for level, value in _LEVELS.items() if value <= in_force), default=pb.LOG_LEVEL_DEBUG)
            chosen.setLevel(_LEVELS[request.level])
            logger.warning("an operator set the level of %s to %s", name, logging.getLevelName(chosen.level))
        return pb.SetLogLevelResponse(before=before)
