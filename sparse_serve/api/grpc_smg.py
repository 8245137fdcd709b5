"""The service `vllm.grpc.engine.VllmEngine`, which routers speak (SMG, llm-d); on with `--smg`, if installed.

What answers is the servicer of the package smg-grpc-servicer, as in `vllm serve --grpc`, on this server's engine. Every
call goes through what the calls of `sparse_serve.v1` go through: keys, ids, limits, shares, the drain, metrics.

Three things differ from `vllm serve --grpc`. No answer names a directory. A client ends its own requests only: those
of its key, or without keys of its connection. And what belongs to operators, or needs more than this server is, ends
with UNIMPLEMENTED: flushing the cache, profiles; images, and prompts that were read elsewhere (KV transfer), with
INVALID_ARGUMENT.
"""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import grpc

from sparse_serve.api.grpc_calls import Answering, Calls
from sparse_serve.runtime.errors import (
    BadRequestError,
    EngineDiedError,
    EngineStartError,
    OverloadedError,
    SettingsError,
    UnavailableError,
    UnknownModelError,
    UnsupportedError,
)
from sparse_serve.server.admission import Phase
from sparse_serve.server.body_limits import body_limits

SERVICE = "vllm.grpc.engine.VllmEngine"
_ERRORS: dict[grpc.StatusCode, type[Exception]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequestError,
    grpc.StatusCode.NOT_FOUND: UnknownModelError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.FAILED_PRECONDITION: UnsupportedError,
}
_GRAMMARS = {"json_schema": "json", "regex": "regex", "grammar": "grammar", "structural_tag": "structural_tag"}
_WARM_UP = "SMG_VLLM_SERVICER_WARMUP"
"""The servicer's variable. In a process that has read vLLM's flags it sends the engine 45,000 tokens in 256 sequences
when it is made, and holds its own readiness meanwhile; here they would run beside the first clients, before them."""
_FOREIGN = ("media_refs", "mm_inputs", "kv_transfer_params", "kv_transfer_params_json")


class VllmEngineService:
    """The calls of `vllm_engine.proto`. Raises `SettingsError` where the package is not installed."""

    def __init__(self, calls: Calls) -> None:
        try:
            from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
        except ImportError:
            raise SettingsError("--smg: not installed; pip install 'sparse-serve[smg]'") from None
        self._calls, self._pb, self._services = calls, vllm_engine_pb2, vllm_engine_pb2_grpc
        self._inner: Any = None

    def add_to(self, server: Any) -> None:
        """Register with a gRPC server."""
        self._services.add_VllmEngineServicer_to_server(self, server)

    def connect(self) -> None:
        """The engine runs: be able to take requests. Raises `EngineStartError`."""
        from sparse_serve.engine.vllm_engine import VllmEngine

        engine = self._calls.context.engine
        if not isinstance(engine, VllmEngine):
            raise EngineStartError(f"--smg needs a vLLM engine, not {type(engine).__name__}")
        from smg_grpc_servicer.vllm.servicer import VllmEngineServicer

        os.environ.setdefault(_WARM_UP, "off")
        self._inner = VllmEngineServicer(engine.client, time.time())

    async def Generate(self, request: Any, call: Any) -> None:
        """Tokens or text in, tokens out, in pieces or at once."""
        async with self._calls.answering("VllmEngine.Generate", call, given_id=request.request_id) as answering:
            self._calls.context.generating()
            sequences = self._check(request)
            request.request_id = answering.outcome.id
            with self._calls.share(call, sequences):
                await self._stream(self._inner.Generate, request, answering)

    async def Embed(self, request: Any, call: Any) -> Any:
        """A vector for a prompt, of a model that makes them."""
        async with self._calls.answering("VllmEngine.Embed", call, given_id=request.request_id) as answering:
            self._calls.context.embedding()
            request.request_id = answering.outcome.id
            with self._calls.share(call, 1):
                answer = await self._inner.Embed(request, _Inner(answering, self._died))
        return answer

    async def HealthCheck(self, request: Any, call: Any) -> Any:
        """Whether requests are taken."""
        phase = self._calls.context.admission.phase
        return self._pb.HealthCheckResponse(healthy=phase is Phase.READY, message=phase.value)

    async def Abort(self, request: Any, call: Any) -> Any:
        """End requests of this client: of its key, or without keys of this connection."""
        async with self._calls.answering("VllmEngine.Abort", call):
            client = self._calls.client(call)
            for id_ in request.request_ids:
                self._calls.context.admission.abort(id_, client)
        return self._pb.AbortResponse()

    async def GetModelInfo(self, request: Any, call: Any) -> Any:
        """What is served."""
        async with self._calls.answering("VllmEngine.GetModelInfo", call) as answering:
            name = self._calls.context.served().model
            info = await self._inner.GetModelInfo(request, _Inner(answering, self._died))
            info.model_path = info.tokenizer_path = info.served_model_name = name
        return info

    async def GetServerInfo(self, request: Any, call: Any) -> Any:
        """How many replicas, how many requests at a time."""
        async with self._calls.answering("VllmEngine.GetServerInfo", call) as answering:
            self._calls.context.served()
            info = await self._inner.GetServerInfo(request, _Inner(answering, self._died))
        return info  # noqa: RET504  what goes wrong while it is made is answered, too

    async def GetLoads(self, request: Any, call: Any) -> Any:
        """How busy it is."""
        async with self._calls.answering("VllmEngine.GetLoads", call) as answering:
            self._calls.context.served()
            loads = await self._inner.GetLoads(request, _Inner(answering, self._died))
        return loads  # noqa: RET504  what goes wrong while it is made is answered, too

    async def GetTokenizer(self, request: Any, call: Any) -> None:
        """The files of the tokenizer, in a ZIP."""
        async with self._calls.answering("VllmEngine.GetTokenizer", call) as answering:
            self._calls.context.served()
            await self._stream(self._inner.GetTokenizer, request, answering)

    async def SubscribeKvEvents(self, request: Any, call: Any) -> None:
        """What is in the prefix cache, as it changes, until the client leaves; with vLLM's `--kv-events-config`."""
        if self._calls.context.keys is not None:  # events hold the tokens of every client's prompts
            await self._unsupported("SubscribeKvEvents", call)
        async with self._calls.answering("VllmEngine.SubscribeKvEvents", call, holds_drain=False) as answering:
            self._calls.context.served()
            events = self._inner.SubscribeKvEvents(request, _Inner(answering, self._died))
            async with contextlib.aclosing(events):
                async for event in events:
                    await self._calls.write(answering, event)

    async def FlushCache(self, request: Any, call: Any) -> None:
        """Not for clients."""
        await self._unsupported("FlushCache", call)

    async def StartProfile(self, request: Any, call: Any) -> None:
        """Not for clients."""
        await self._unsupported("StartProfile", call)

    async def StopProfile(self, request: Any, call: Any) -> None:
        """Not for clients."""
        await self._unsupported("StopProfile", call)

    async def _unsupported(self, method: str, call: Any) -> None:
        async with self._calls.answering(f"VllmEngine.{method}", call):
            raise UnsupportedError(f"{method} is not answered here")

    async def _stream(self, method: Callable[..., Any], request: Any, answering: Answering) -> None:
        answers = method(request, _Inner(answering, self._died))
        async with contextlib.aclosing(answers):
            async for answer in answers:
                await self._calls.write(answering, answer)

    def _died(self) -> bool:
        return self._calls.context.engine.died

    def _check(self, request: Any) -> int:
        """The number of sequences that are asked for. Raises `BadRequestError`; vLLM checks the rest."""
        for name in _FOREIGN:
            if request.HasField(name):
                raise BadRequestError(f"{name}: this server takes text and tokens only", name)
        params = request.sampling_params
        asked: dict[str, Any] = {"n": params.n or 1, "logit_bias": dict(params.logit_bias)}
        asked |= {"stop": list(params.stop), "stop_token_ids": list(params.stop_token_ids)}
        kind = params.WhichOneof("constraint")
        if kind == "choice":
            asked["structured_outputs"] = {"choice": list(params.choice.choices)}
        elif kind in _GRAMMARS:
            asked["structured_outputs"] = {_GRAMMARS[kind]: getattr(params, kind)}
        return body_limits(self._calls.context.settings).check_asked(asked)


class _Inner:
    """What smg's servicer takes for its call: a status that it ends with becomes an exception of this server."""

    def __init__(self, answering: Answering, died: Callable[[], bool]) -> None:
        self._answering, self._died = answering, died

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The trace context, checked."""
        return tuple(self._answering.origin.trace.items())

    async def abort(self, code: grpc.StatusCode, details: str = "", *more: Any) -> None:
        """Raise what a status stands for; what is not listed is unexpected."""
        if self._died():
            raise EngineDiedError("the engine has died; this server is going down")
        raise _ERRORS.get(code, RuntimeError)(details)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answering.call, name)
