"""How often streams are written to: every token at once while few are running, several tokens at a time when many are.

A message costs a server more than the token in it: about 50 us of a core through gRPC, where the engine's part of a
token takes 30. So all streams together get a number of messages per second. After a message a stream waits for the next
of a clock's ticks, which are as far apart as the running streams make it, and what the engine has made of it until then
goes into one message. The first token of a stream is not held back.

    streams   messages_per_s   a stream gets a message
    3         2000             for every token
    64        2000             every 32 ms
    200       2000             every 50 ms, and never less often
"""

import asyncio
import contextlib
from collections.abc import Iterator

_LEAST_S = 0.002
"""Shorter waits are not worth a timer."""
_MOST_S = 0.05
"""As often as text has to grow to look steady."""


class Pace:
    """The clock of all streams, of which there is none while `messages_per_s` is 0. For one event loop."""

    def __init__(self, messages_per_s: int) -> None:
        self._per_s = messages_per_s
        self._streams = 0
        self._tick: asyncio.Event | None = None

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """While a stream is running."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def wait(self) -> None:
        """Between two messages of a stream: until it may have the next."""
        pause_s = min(self._streams / self._per_s, _MOST_S) if self._per_s else 0.0
        if pause_s < _LEAST_S:
            return
        if self._tick is None:
            self._tick = asyncio.Event()
            asyncio.get_running_loop().call_later(pause_s, self._strike)
        await self._tick.wait()

    def _strike(self) -> None:
        tick, self._tick = self._tick, None
        if tick is not None:
            tick.set()
