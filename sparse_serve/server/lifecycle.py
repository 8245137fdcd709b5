"""The server's life: one engine and its APIs, from the first bound port to the last freed one.

    bind the ports      a taken port is known at once; every API answers "unavailable" from here on
    start the engine    tens of seconds; `stop` ends it
    serve               APIs are connected to the engine, `Ready` comes last
    drain               after `stop`: refuse new requests, wait up to `drain_s` for running ones
    stop                the HTTP port, then the APIs, then the engine

Each step is told to a callback as an `Event`; the command line prints them. A second `stop` changes nothing: every wait
has a time limit already, and killing in a hurry is what leaves processes behind.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from prometheus_client import CollectorRegistry

from sparse_serve.engine import Engine, EngineInfo
from sparse_serve.server.admission import Admission, Phase
from sparse_serve.server.body_limits import body_limits
from sparse_serve.server.context import Api, ServerContext
from sparse_serve.server.gatekeeper import Gatekeeper, Rules
from sparse_serve.server.keys import Keys
from sparse_serve.server.listener import HttpListener
from sparse_serve.server.metrics import Metrics
from sparse_serve.server.protocol import ConnectionLimits
from sparse_serve.server.routes import serving
from sparse_serve.server.settings import Settings
from sparse_serve.server.tls import Tls, TlsFiles
from sparse_serve.server.watchdog import until_hung

logger = logging.getLogger(__name__)

_WATCH_S = 0.25
_FAIL_S = 2.0
_CUT_OFF_S = 0.5
_CHUNKED = 8
"""A body in chunks of a byte is that many times as long on the wire, or less."""
_ENGINE_STOP_S = 5.0


@dataclass(frozen=True)
class Listening:
    """The ports are bound: `host:port` of HTTP and of gRPC. The engine starts now."""

    http: str
    grpc: str


@dataclass(frozen=True)
class Ready:
    """Requests are taken."""

    info: EngineInfo
    http: str
    grpc: str


@dataclass(frozen=True)
class Draining:
    """No new request is taken; those running, `requests` of them, get `limit_s` seconds."""

    requests: int
    limit_s: float


@dataclass(frozen=True)
class CutOff:
    """The time is up for so many requests."""

    requests: int
    limit_s: float


@dataclass(frozen=True)
class EngineDied:
    """The engine is gone without having been asked; the server ends."""


@dataclass(frozen=True)
class EngineHung:
    """The engine lives and has made no step for `limit_s` seconds, though it was asked; the server ends."""

    limit_s: float


@dataclass(frozen=True)
class Stopped:
    """All is closed, after `stop` or after the engine died."""


Event = Listening | Ready | Draining | CutOff | EngineDied | EngineHung | Stopped


class Server:
    """One engine behind the given APIs, modules of `sparse_serve.api`. `run` once."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        apis: Sequence[ModuleType],
        registry: CollectorRegistry,
        on_event: Callable[[Event], None],
    ) -> None:
        self._metrics = Metrics(registry)
        self.context = shared(engine, settings, self._metrics)
        self._apis: list[Api] = [module.create(self.context) for module in apis]
        self._tell = on_event
        self._stopping = asyncio.Event()
        self.context.stop = self.stop

    async def run(self) -> int:
        """Serve until `stop` is called, or the engine dies or hangs.

        Returns the exit code: 0 after `stop`, 1 if the engine died or hangs. Raises what kept it from starting
        (`PortInUseError`, `EngineStartError`, `SettingsError`), with everything closed.
        """
        try:
            code = await self._live()
        finally:
            await self._close()
        self._tell(Stopped())
        return code

    def stop(self) -> None:
        """Drain and end; call it in the event loop's thread. Calling it again changes nothing."""
        self._stopping.set()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    async def _live(self) -> int:
        listening = await self._listen()
        self._tell(listening)
        info = await self._start_engine()
        if info is None:
            logger.info("stopped while starting")
            return 0
        await self._open(info, listening)
        return await self._until_the_end()

    async def _listen(self) -> Listening:
        http = await self.context.listener.start()
        grpc = [await api.start() for api in self._apis]
        return Listening(http, next(filter(None, grpc), ""))

    async def _start_engine(self) -> EngineInfo | None:
        """The started engine's info, or None when `stop` came first."""
        starting = asyncio.create_task(self.context.engine.start())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if starting.done():
            return starting.result()
        await self.context.engine.stop(0.0)
        # what still runs in the start thread, a download say, may end when it likes
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return None

    async def _open(self, info: EngineInfo, listening: Listening) -> None:
        context = self.context
        context.info = info
        self._metrics.show(info)
        for api in self._apis:
            await api.serve()
        context.admission.phase = Phase.READY
        self._tell(Ready(info, listening.http, listening.grpc))

    async def _until_the_end(self) -> int:
        context = self.context
        hung = await self._wait_for_an_end()
        # a Ctrl-C reaches the engine process too, which then ends by itself: that is no death
        died = hung or (context.engine.died and not self._stopping.is_set())
        context.admission.phase = Phase.DEAD if died else Phase.DRAINING
        for api in self._apis:
            await api.drain()
        if died:
            logger.error("the engine %s; going down", "hangs" if hung else "has died")
            self._tell(EngineHung(context.settings.watchdog_s) if hung else EngineDied())
            if hung or not await context.admission.wait_idle(_FAIL_S):
                await self._cut_off()
            return 1
        await self._drain()
        return 0

    async def _wait_for_an_end(self) -> bool:
        """Until `stop` was called, the engine has died, or it hangs; whether it hangs."""
        engine, limit_s = self.context.engine, self.context.settings.watchdog_s
        watchdog = asyncio.create_task(until_hung(engine, limit_s)) if limit_s else None
        try:
            while not self._stopping.is_set() and not engine.died:
                if watchdog is not None and watchdog.done():
                    watchdog.result()
                    return not engine.died
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _WATCH_S)
        finally:
            if watchdog is not None:
                watchdog.cancel()
        return False

    async def _drain(self) -> None:
        admission, drain_s = self.context.admission, self.context.settings.drain_s
        logger.info("draining: %d requests get up to %g s", admission.in_flight, drain_s)
        self._tell(Draining(admission.in_flight, drain_s))
        if not await admission.wait_idle(drain_s):
            logger.warning("%d requests did not finish in %g s and are cut off", admission.in_flight, drain_s)
            self._tell(CutOff(admission.in_flight, drain_s))
            await self._cut_off()

    async def _cut_off(self) -> None:
        """Tell those who wait for an answer that none will come, before their connections are closed."""
        self.context.listener.cut_off()
        await self.context.admission.wait_idle(_CUT_OFF_S)

    async def _close(self) -> None:
        """Stop everything that was started, whatever state it is in, and whatever fails on the way."""
        closers = [api.stop(0.0) for api in reversed(self._apis)]
        closers.insert(0, self.context.listener.stop(0.0))
        closers.append(self.context.engine.stop(_ENGINE_STOP_S))
        for closer in closers:
            try:
                await closer
            except Exception:
                logger.exception("while stopping")


def shared(engine: Engine, settings: Settings, metrics: Metrics) -> ServerContext:
    """What APIs share, by the settings. Raises `SettingsError` for files that cannot be used."""
    admission = Admission(metrics, settings.max_sequences_per_client, settings.max_num_queued_reqs)
    keys = Keys(Path(settings.api_keys)) if settings.api_keys else None
    admin_keys = Keys(Path(settings.admin_keys), "--admin-keys") if settings.admin_keys else None
    client_ca = Path(settings.tls_client_ca) if settings.tls_client_ca else None
    tls = Tls(TlsFiles(Path(settings.tls_cert), Path(settings.tls_key), client_ca)) if settings.tls_cert else None
    limits = body_limits(settings)
    rules = Rules(settings.max_message_bytes, settings.body_s, limits, keys, serving(settings.extra_routes))
    connections = ConnectionLimits(
        settings.max_connections,
        settings.max_header_bytes,
        settings.max_header_bytes + _CHUNKED * settings.max_message_bytes,
        settings.header_s,
        settings.write_s,
    )
    listener = HttpListener(
        settings.host,
        settings.http_port,
        Gatekeeper(admission, rules, lambda: engine.died),
        connections,
        tls.context if tls else None,
    )
    return ServerContext(engine, settings, admission, listener, keys, tls, admin_keys)
