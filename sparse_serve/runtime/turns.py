"""When it is the turn of a request's sequences: who admits it says so, and the engine asks.

Turns are virtual times (`server.fair_order`), lower ones first. With nobody to say, as for the server's own requests,
it is 0, before all others.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class _Turns:
    last: int
    end: int


_turns: ContextVar[_Turns | None] = ContextVar("turns", default=None)


def enter(start: int, end: int) -> None:
    """The task that calls this, and those it starts, answer a request whose sequences are due after `start`, until
    `end`."""
    _turns.set(_Turns(start, end))


def due(sequences: int) -> int:
    """When the last of the next `sequences` of this request is due; never later than its end, whatever it asks for."""
    turns = _turns.get()
    if turns is None:
        return 0
    turns.last = min(turns.last + sequences, turns.end)
    return turns.last
