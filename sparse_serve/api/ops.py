"""Operations over HTTP: `/readyz` and `/healthz` for probes, `/sparse-serve/info` for people.

`/readyz` (and `/ready`) is 200 while requests are taken and 503 while the model loads, while draining, and when the
engine has died. `/healthz` is 200 as long as this process has not lost its engine: a probe that restarts what fails
leaves a server that loads, or drains, alone. Neither needs a key. vLLM's own `/health` says less: it exists only once
the model is loaded, and knows nothing of draining.
"""

import dataclasses

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from sparse_serve.server.admission import Phase
from sparse_serve.server.context import ServerContext


def create(context: ServerContext) -> "OpsApi":
    """The API for operators, mounted on the HTTP listener."""
    return OpsApi(context)


class OpsApi:
    """Implements `Api`."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def start(self) -> str:
        """Mount: these routes answer in every phase."""
        for path in ("/ready", "/readyz"):
            self._context.listener.mount(path, self._ready, needs_key=False)
        self._context.listener.mount("/healthz", self._healthy, needs_key=False)
        self._context.listener.mount("/sparse-serve/info", self._info)
        return ""

    async def serve(self) -> None:
        """Nothing to do: the routes look at the phase."""

    async def drain(self) -> None:
        """Nothing to do: the routes look at the phase."""

    async def stop(self, grace_s: float) -> None:
        """Nothing to do: the routes go with the listener."""

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        admission = self._context.admission
        status = 200 if admission.phase is Phase.READY else 503
        body = {"phase": admission.phase.value, "in_flight": admission.in_flight}
        await JSONResponse(body, status)(scope, receive, send)

    async def _healthy(self, scope: Scope, receive: Receive, send: Send) -> None:
        admission = self._context.admission
        status = 503 if admission.phase is Phase.DEAD else 200
        await JSONResponse({"phase": admission.phase.value}, status)(scope, receive, send)

    async def _info(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = self._context
        engine = None if context.info is None else dataclasses.asdict(context.info)
        if engine is not None and context.info is not None and context.info.quality is not None:
            engine["quality"] |= {"bad": context.info.quality.is_bad, "advice": context.info.quality.advice()}
        progress = context.engine.progress
        load = {
            "in_flight": context.admission.in_flight,
            "prompt_tokens": progress.prompt_tokens,
            "generated_tokens": progress.generated_tokens,
        }
        content = {"phase": context.admission.phase.value, "load": load, "engine": engine}
        await JSONResponse(content)(scope, receive, send)
