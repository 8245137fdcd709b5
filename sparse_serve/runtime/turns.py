"""Whose turn it is: a request waits behind those of clients that have less running, not behind all that came before.

Who admits a request says how much its client has running (`enter`), and the engine asks for the place of each sequence
in it (`place`): the first sequence of a client has place 0 and comes before the hundredth of another. With nobody to
say, as for the server's own requests, the place is 0.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class _Turn:
    next: int


_turn: ContextVar[_Turn | None] = ContextVar("turn", default=None)


def enter(running: int) -> None:
    """The task that calls this, and those it starts, answer a request of a client that has `running` sequences."""
    _turn.set(_Turn(running))


def place(sequences: int) -> int:
    """The place of the next `sequences` of this request, lower ones first."""
    turn = _turn.get()
    if turn is None:
        return 0
    found = turn.next
    turn.next += sequences
    return found
