"""Operations over HTTP: `/ready` for load balancers, `/sparse-serve/info` for people.

`/ready` is 200 while requests are taken and 503 while the model loads, while draining, and when the engine has died.
vLLM's own `/health` says less: it exists only once the model is loaded, and knows nothing of draining.
"""

import dataclasses

from sparse_serve.api import House
from sparse_serve.server.admission import Phase
from sparse_serve.server.listener import Receive, Scope, Send, send_json


def create(house: House) -> "OpsDoor":
    """The door for operators, mounted on the HTTP front."""
    return OpsDoor(house)


class OpsDoor:
    """Implements `Door`."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def start(self) -> str:
        """Mount: these routes answer in every phase."""
        self._house.front.mount("/ready", self._ready)
        self._house.front.mount("/sparse-serve/info", self._info)
        return ""

    async def serve(self) -> None:
        """Nothing to do: the routes look at the phase."""

    async def drain(self) -> None:
        """Nothing to do: the routes look at the phase."""

    async def stop(self, grace_s: float) -> None:
        """Nothing to do: the routes go with the front."""

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        traffic = self._house.traffic
        status = 200 if traffic.phase is Phase.READY else 503
        await send_json(send, status, {"phase": traffic.phase.value, "in_flight": traffic.in_flight})

    async def _info(self, scope: Scope, receive: Receive, send: Send) -> None:
        house = self._house
        engine = None if house.info is None else dataclasses.asdict(house.info)
        body = {"phase": house.traffic.phase.value, "engine": engine, "settings": dataclasses.asdict(house.settings)}
        await send_json(send, 200, body)
