"""When it is the turn of a request's sequences: who admits it says so, and the engine asks.

Turns are virtual times (`server.fair_order`), lower ones first. With nobody to say, as for the server's own requests,
it is 0, before all others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Turns:
    """Those of one request, the last that was had, and for each of its prompts, whether the engine has begun it."""

    last: int
    end: int
    _have_begun: list[Callable[[], bool]] = field(default_factory=list)

    @property
    def have_begun(self) -> bool:
        """Whether one of its sequences has had its turn: one that is cancelled before, or refused, has had none."""
        return any(has_begun() for has_begun in self._have_begun)

    def watch(self, has_begun: Callable[[], bool]) -> None:
        """Ask this whether a prompt has been begun."""
        self._have_begun.append(has_begun)


_turns: ContextVar[Turns | None] = ContextVar("turns", default=None)


def enter(start: int, end: int) -> Turns:
    """The task that calls this, and those it starts, answer a request whose sequences are due after `start`, until
    `end`."""
    turns = Turns(start, end)
    _turns.set(turns)
    return turns


def current() -> Turns | None:
    """Those of the request that this task answers."""
    return _turns.get()


def due(sequences: int) -> int:
    """When the last of the next `sequences` of this request is due; never later than its end, whatever it asks for."""
    turns = _turns.get()
    if turns is None:
        return 0
    turns.last = min(turns.last + sequences, turns.end)
    return turns.last
