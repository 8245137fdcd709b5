"""The order of requests among clients: self-clocked fair queueing (Golestani, INFOCOM 1994), a sequence being the unit.

Each client has a virtual time, which goes on by its sequences; a request is due when its client's time is over it. The
clock of all is over the first turn of every request that was begun and has ended, and not behind that of the request
inside that came first; no client's time is behind the clock: nobody saves up turns, and everybody's time comes, however
many others there are and however many of them are new. Who cancels what was never begun moves its own time only: else a
client that does nothing else would put off all that come after it. But `_CANCELS` of those that were due next move the
clock to the next request: else one that is a new client each time would always come before one that waits.
"""

from __future__ import annotations

from dataclasses import dataclass

_CANCELS = 16


@dataclass(frozen=True, eq=False)
class Span:
    """Virtual times of one request: its sequences are due at `start` + 1, `start` + 2, ..., `end`."""

    client: str
    start: int
    end: int


class FairOrder:
    """Virtual times of clients that have requests inside, or had them not long ago."""

    def __init__(self) -> None:
        self._clock = 0
        self._cancels = 0
        self._ends: dict[str, int] = {}
        self._inside: dict[Span, None] = {}

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._ends)

    def enter(self, client: str, sequences: int) -> Span:
        """A request comes in."""
        start = max(self._clock, self._ends.get(client, 0))
        span = Span(client, start, start + sequences)
        self._ends[client] = span.end
        self._inside[span] = None
        return span

    def leave(self, span: Span, has_begun: bool) -> None:
        """A request has ended, of which a sequence `has_begun`, or which was cancelled before."""
        del self._inside[span]
        if self._inside:
            first = min(other.start for other in self._inside)
            self._clock = max(self._clock, first, span.start + 1 if has_begun else self._after_cancel(span))
            self._ends = {client: end for client, end in self._ends.items() if end > self._clock}
        else:
            self._clock = max([self._clock, *self._ends.values()])
            self._ends.clear()

    def _after_cancel(self, span: Span) -> int:
        """The time to which a request moves the clock that was cancelled before it was begun."""
        self._cancels += span.start <= self._clock
        if self._cancels < _CANCELS:
            return 0
        self._cancels = 0
        return min((other.start for other in self._inside if other.start > self._clock), default=0)
