"""The process: one engine, its doors, and their life from the first bound port to the last freed one.

    bind the ports      a clash is known at once; every door answers "unavailable" from here on
    start the engine    tens of seconds; a signal now ends it
    serve               doors attach to the engine, ready is set last, the banner is printed
    drain               on `stop` (a signal): not ready, refuse new requests, wait for running ones up to `drain_s`
    stop                doors, then the HTTP port, then the engine

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

from sparse_serve.api import Door, House
from sparse_serve.engine import Engine, EngineInfo
from sparse_serve.server.admission import Phase, Traffic
from sparse_serve.server.listener import HttpFront
from sparse_serve.server.metrics import Metrics
from sparse_serve.server.settings import Settings

logger = logging.getLogger(__name__)

_WATCH_S = 0.25
_FAIL_S = 2.0
_ENGINE_STOP_S = 5.0


class Server:
    """One engine behind the given doors. `run` once."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        doors: Sequence[ModuleType],
        registry: CollectorRegistry,
        announce: Callable[[str], None],
    ) -> None:
        self._metrics = Metrics(registry)
        traffic = Traffic(self._metrics)
        front = HttpFront(settings.host, settings.http_port, traffic, settings.max_message_bytes)
        self.house = House(engine, settings, traffic, front)
        self._doors: list[Door] = [module.create(self.house) for module in doors]
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
        http = await self.house.front.start()
        grpc = [await door.start() for door in self._doors]
        return {"http": http, "grpc": next(filter(None, grpc), "")}

    async def _start_engine(self) -> EngineInfo | None:
        """The started engine's info, or None when `stop` came first."""
        starting = asyncio.create_task(self.house.engine.start())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if starting.done():
            return starting.result()
        await self.house.engine.stop(0.0)
        # what still runs in the start thread, a download say, may end when it likes
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return None

    async def _open(self, info: EngineInfo, addresses: dict[str, str]) -> None:
        house = self.house
        house.info = info
        self._metrics.show(info)
        for door in self._doors:
            await door.serve()
        house.traffic.phase = Phase.READY
        self._announce(banner(info, addresses["http"], addresses["grpc"]))

    async def _until_the_end(self) -> int:
        house = self.house
        while not self._stopping.is_set() and not house.engine.died:
            try:
                await asyncio.wait_for(self._stopping.wait(), _WATCH_S)
            except TimeoutError:
                continue
        # a Ctrl-C reaches the engine process too, which then ends by itself: that is no death
        died = house.engine.died and not self._stopping.is_set()
        house.traffic.phase = Phase.DEAD if died else Phase.DRAINING
        for door in self._doors:
            await door.drain()
        if died:
            logger.error("the engine has died; going down")
            await house.traffic.wait_idle(_FAIL_S)
            return 1
        await self._drain()
        return 0

    async def _drain(self) -> None:
        traffic, drain_s = self.house.traffic, self.house.settings.drain_s
        logger.info("draining: %d requests get up to %g s", traffic.in_flight, drain_s)
        if not await traffic.wait_idle(drain_s):
            logger.warning("%d requests did not finish in %g s and are cut off", traffic.in_flight, drain_s)

    async def _close(self) -> None:
        """Stop everything that was started, whatever state it is in, and whatever fails on the way."""
        closers = [door.stop(0.0) for door in reversed(self._doors)]
        closers.insert(0, self.house.front.stop(0.0))
        closers.append(self.house.engine.stop(_ENGINE_STOP_S))
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
