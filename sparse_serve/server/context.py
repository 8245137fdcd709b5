"""`ServerContext`, the objects that APIs share, and `Api`, the protocol every API implements."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sparse_serve.engine import Engine, EngineInfo
from sparse_serve.runtime.errors import UnsupportedError
from sparse_serve.server.admission import Admission
from sparse_serve.server.keys import Keys
from sparse_serve.server.listener import HttpListener
from sparse_serve.server.settings import Settings
from sparse_serve.server.tls import Tls


@dataclass
class ServerContext:
    """What APIs share. `info` is set by the server when the engine has started. Without `keys`, all may come in, and
    without `admin_keys` there is no service for operators. `stop` begins to drain."""

    engine: Engine
    settings: Settings
    admission: Admission
    listener: HttpListener
    keys: Keys | None = None
    tls: Tls | None = None
    admin_keys: Keys | None = None
    info: EngineInfo | None = None
    stop: Callable[[], None] = lambda: None

    def served(self) -> EngineInfo:
        """`info`, when requests are being taken. Else raises `UnavailableError` or `EngineDiedError`, saying why."""
        self.admission.check()
        assert self.info is not None
        return self.info

    def generating(self) -> EngineInfo:
        """`served`, of a model that generates. Else raises `UnsupportedError`, too."""
        info = self.served()
        if info.embeds:
            raise UnsupportedError("this model makes embeddings and generates no text")
        return info

    def embedding(self) -> EngineInfo:
        """`served`, of a model that makes embeddings. Else raises `UnsupportedError`, too."""
        info = self.served()
        if not info.embeds:
            raise UnsupportedError("this model generates text and makes no embeddings")
        return info


class Api(Protocol):
    """One API of the server, which calls the four methods once each, in this order."""

    async def start(self) -> str:
        """Begin to answer "unavailable". Returns `host:port` if the API listens itself, `""` if it is mounted on the
        HTTP listener. Raises `PortInUseError`."""

    async def serve(self) -> None:
        """The engine is up (`ServerContext.info` is set): be able to take requests. Raises `ServeError`."""

    async def drain(self) -> None:
        """Tell health checks that this replica is leaving. `Admission` refuses new requests by itself."""

    async def stop(self, grace_s: float) -> None:
        """Give running requests `grace_s` seconds, cancel the rest, and close. Safe after a failed `start` too."""
