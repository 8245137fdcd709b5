"""The process: one engine, its APIs, and their life from the first bound port to the last freed one.

    bind the ports      a clash is known at once; every API answers "unavailable" from here on
    start the engine    tens of seconds; a signal now ends it
    serve               APIs attach to the engine, ready is set last, the banner is printed
    drain               on `stop` (a signal): not ready, refuse new requests, wait for running ones up to `drain_s`
    stop                APIs, then the HTTP port, then the engine

The exit code is 0 after a signal, 1 if the engine died. A second signal changes nothing: what could be hurried has a
time limit already, and an impatient kill is what leaves processes behind.
"""

import asyncio
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from prometheus_client import CollectorRegistry

from sparse_serve.engine import Engine, EngineInfo
from sparse_serve.server.admission import Admission, Phase
from sparse_serve.server.context import Api, ServerContext
from sparse_serve.server.listener import HttpListener
from sparse_serve.server.metrics import Metrics
from sparse_serve.server.settings import Settings

logger = logging.getLogger(__name__)

_WATCH_S = 0.25
_FAIL_S = 2.0
_ENGINE_STOP_S = 5.0


class Server:
    """One engine behind the given APIs. `run` once."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        apis: Sequence[ModuleType],
        registry: CollectorRegistry,
        announce: Callable[[str], None],
    ) -> None:
        self._metrics = Metrics(registry)
        admission = Admission(self._metrics)
        listener = HttpListener(settings.host, settings.http_port, admission, settings.max_message_bytes)
        self.server_context = ServerContext(engine, settings, admission, listener)
        self._apis: list[Api] = [module.create(self.server_context) for module in apis]
        self._announce = announce
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Serve until `stop` is called or the engine dies. Returns the exit code; raises what kept it from starting."""
        try:
            addresses = await self._listen()
            info = await self._start_engine()
            if info is None:
                logger.info("stopped while starting")
                return 0
            await self._open(info, addresses)
            return await self._until_the_end()
        finally:
            await self._close()

    def stop(self) -> None:
        """Drain and end, from the event loop's thread. Calling it again changes nothing."""
        self._stopping.set()

    async def _listen(self) -> dict[str, str]:
        http = await self.server_context.listener.start()
        grpc = [await api.start() for api in self._apis]
        return {"http": http, "grpc": next(filter(None, grpc), "")}

    async def _start_engine(self) -> EngineInfo | None:
        """The started engine's info, or None when `stop` came first."""
        starting = asyncio.create_task(self.server_context.engine.start())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if starting.done():
            return starting.result()
        await self.server_context.engine.stop(0.0)
        # what still runs in the start thread, a download say, may end when it likes
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return None

    async def _open(self, info: EngineInfo, addresses: dict[str, str]) -> None:
        server_context = self.server_context
        server_context.info = info
        self._metrics.show(info)
        for api in self._apis:
            await api.serve()
        server_context.admission.phase = Phase.READY
        self._announce(banner(info, addresses["http"], addresses["grpc"]))

    async def _until_the_end(self) -> int:
        server_context = self.server_context
        while not self._stopping.is_set() and not server_context.engine.died:
            try:
                await asyncio.wait_for(self._stopping.wait(), _WATCH_S)
            except TimeoutError:
                continue
        # a Ctrl-C reaches the engine process too, which then ends by itself: that is no death
        died = server_context.engine.died and not self._stopping.is_set()
        server_context.admission.phase = Phase.DEAD if died else Phase.DRAINING
        for api in self._apis:
            await api.drain()
        if died:
            logger.error("the engine has died; going down")
            await server_context.admission.wait_idle(_FAIL_S)
            return 1
        await self._drain()
        return 0

    async def _drain(self) -> None:
        admission, drain_s = self.server_context.admission, self.server_context.settings.drain_s
        logger.info("draining: %d requests get up to %g s", admission.in_flight, drain_s)
        if not await admission.wait_idle(drain_s):
            logger.warning("%d requests did not finish in %g s and are cut off", admission.in_flight, drain_s)

    async def _close(self) -> None:
        """Stop everything that was started, whatever state it is in, and whatever fails on the way."""
        closers = [api.stop(0.0) for api in reversed(self._apis)]
        closers.insert(0, self.server_context.listener.stop(0.0))
        closers.append(self.server_context.engine.stop(_ENGINE_STOP_S))
        for closer in closers:
            try:
                await closer
            except Exception:
                logger.exception("while stopping")


def banner(info: EngineInfo, http: str, grpc: str) -> str:
    """What a person wants to read and paste once the server is up."""
    share = f"{info.sparse_layers} sparse layers" if info.sparse_layers else "a dense model"
    body = json.dumps({"model": info.model, "prompt": "Hello", "max_tokens": 16})
    complete = ["curl", f"http://{http}/v1/completions", "-H", "content-type: application/json", "-d", body]
    generate = [*_this_command(), "generate", "--address", grpc, "--max-tokens", "16", "Hello"]
    return f"""
ready: {info.model} ({share}, {info.dtype}, up to {info.max_model_len} tokens)

  HTTP  http://{http}
        {shlex.join(complete)}
  gRPC  {grpc}
        {shlex.join(generate)}
  see   {shlex.join(["curl", f"http://{http}/metrics"])}
"""


def _this_command() -> list[str]:
    """`sparse-serve` for another terminal, whose PATH need not be ours."""
    script = Path(sys.executable).with_name("sparse-serve")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "sparse_serve.cli.main"]
