"""The doors: every file here is one way into the engine, and the file's name is the door's name.

A door module defines `create(house) -> Door`. The server walks each of them through the same life:

    start    before the engine: answer at once, with "unavailable"
    serve    the engine is up: be able to take requests
    drain    tell health checks that this replica is leaving
    stop     end what still runs after `grace_s`, close

A door takes what it needs from the `House`: the engine, the settings, the HTTP front to mount on, and the `Traffic`,
which says whether requests are taken and counts those inside. Doors do not know each other.
"""

from dataclasses import dataclass
from typing import Protocol

from sparse_serve.engine import Engine, EngineInfo
from sparse_serve.server.admission import Traffic
from sparse_serve.server.listener import HttpFront
from sparse_serve.server.settings import Settings


@dataclass
class House:
    """What doors share. `info` is set by the server when the engine has started."""

    engine: Engine
    settings: Settings
    traffic: Traffic
    front: HttpFront
    info: EngineInfo | None = None

    def served(self) -> EngineInfo:
        """`info`, when requests are being taken; else the error that says why not."""
        self.traffic.check()
        assert self.info is not None
        return self.info


class Door(Protocol):
    """One way in. The server calls the four methods once each, in this order."""

    async def start(self) -> str:
        """Begin to answer "unavailable". Returns `host:port` if the door listens itself, `""` if it is mounted on the
        HTTP front. Raises `PortInUseError`."""

    async def serve(self) -> None:
        """The engine is up (`House.info` is set): be able to take requests. Raises `ServeError`."""

    async def drain(self) -> None:
        """Tell health checks that this replica is leaving. `Traffic` refuses new requests by itself."""

    async def stop(self, grace_s: float) -> None:
        """Give running requests `grace_s` seconds, cancel the rest, and close. Safe after a failed `start` too."""
