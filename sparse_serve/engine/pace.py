"""How often streams are written to: every token at once while few are running, several tokens at a time when many are.

A message costs a server more than the token in it: about 60 us of a core, where the engine's part of a token takes 30.
So all streams together get a number of messages per second. After a message a stream waits for the next of a clock's
ticks, which are as far apart as the running streams make it, and what the engine has made of it until then goes into
one message. The first token of a stream is not held back, nor its end; and where the engine takes longer for a token
than the clock for a tick, no token waits.

    streams   messages_per_s   a stream gets a message
    2         1000             for every token
    8         1000             every 8 ms
    50        1000             every 50 ms
    200       1000             every 50 ms, and never less often
"""

import asyncio
from collections.abc import Callable

_LEAST_S = 0.002
"""Shorter waits are not worth a timer."""
_MOST_S = 0.05
"""As often as text has to grow to look steady."""


class Pace:
    """The clock of all streams, of which there is none while `messages_per_s` is 0. For one event loop."""

    def __init__(self, messages_per_s: int) -> None:
        self._per_s = messages_per_s
        self._streams = 0
        self._held: list[Callable[[], None]] = []

    def begin(self) -> None:
        """One more stream is running."""
        self._streams += 1

    def end(self) -> None:
        """A stream that has begun is running no more."""
        self._streams -= 1

    def hold(self, release: Callable[[], None]) -> bool:
        """Whether a stream that has just had a message has to wait for its next; `release` is called at its tick."""
        pause_s = min(self._streams / self._per_s, _MOST_S) if self._per_s else 0.0
        if pause_s < _LEAST_S:
            return False
        if not self._held:
            asyncio.get_running_loop().call_later(pause_s, self._strike)
        self._held.append(release)
        return True

    def _strike(self) -> None:
        held, self._held = self._held, []
        for release in held:
            release()
