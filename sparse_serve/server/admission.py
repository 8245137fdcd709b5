"""Admission: whether requests are taken, and how many are inside. One object for the whole process.

Draining is correct only if every API asks the same question at the same moment, so the phase is here and nowhere
else. Used from the event loop only, so it needs no lock.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sparse_serve.runtime import turns
from sparse_serve.runtime.errors import (
    BadRequestError,
    EngineDiedError,
    OverloadedError,
    TooManyError,
    UnavailableError,
)
from sparse_serve.server.fair_order import FairOrder
from sparse_serve.server.metrics import Metrics

access = logging.getLogger("sparse_serve.access")
"""A line for each request, when it has ended; `--access-log` lets them through."""


_GREED = 2
"""What one client may have running, in terms of what is left free for all."""


class Phase(Enum):
    """Where the process is in its life. It only moves down this list."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Cause(Enum):
    """Why an answer ended in the middle: `ABORTED` by an operator, `UNREAD` by the client for too long."""

    CLIENT = "client"
    DEADLINE = "deadline"
    UNREAD = "unread"
    DRAIN = "drain"
    ENGINE = "engine"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(eq=False)
class Outcome:
    """How a request ended, filled in by its API: gRPC code or HTTP status, whether the client left early, and if its
    answer ended in the middle, why. `id` and `client` say whose it was, for the log."""

    code: str = "OK"
    cancelled: bool = False
    truncated: Cause | None = None
    id: str = ""
    client: str = ""
    aborted: bool = False
    """Whether its task is cancelled because an operator said so."""


class Admission:
    """The phase, and the count of requests inside."""

    def __init__(self, metrics: Metrics, max_per_client: int, max_of_all: int) -> None:
        self._metrics = metrics
        self._max_per_client, self._max_of_all = max_per_client, max_of_all
        self._sequences: Counter[str] = Counter()
        self._order = FairOrder()
        self._receiving = 0
        self._tasks: dict[Outcome, asyncio.Task[Any]] = {}
        self._phase = Phase.STARTING
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        for api, cause in itertools.product(("http", "grpc"), Cause):
            metrics.truncated.labels(api, cause.value)  # at 0: Prometheus sees no increase in a series that begins at 1

    @property
    def phase(self) -> Phase:
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        self._metrics.ready.set(1 if phase is Phase.READY else 0)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def check(self) -> None:
        """Raise `UnavailableError` or `EngineDiedError` unless requests are taken now."""
        if self._phase is Phase.STARTING:
            raise UnavailableError("the server is starting: the model is not loaded yet")
        if self._phase is Phase.DRAINING:
            raise UnavailableError("the server is draining: it finishes running requests and takes no new ones")
        if self._phase is Phase.DEAD:
            raise EngineDiedError("the engine has died; this server is going down")

    @contextlib.contextmanager
    def request(self, api: str, method: str, holds_drain: bool = True) -> Iterator[Outcome]:
        """Count a request and record how it ended. While it is answered it is inside, and a drain waits for it, unless
        it is one of those that tell about the server (not `holds_drain`)."""
        outcome, started_s = Outcome(), time.perf_counter()
        with self._inside(api, outcome) if holds_drain else contextlib.nullcontext():
            try:
                yield outcome
            finally:
                self._record(api, method, outcome, time.perf_counter() - started_s)

    @contextlib.contextmanager
    def _inside(self, api: str, outcome: Outcome) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[outcome] = task
        in_flight = self._metrics.in_flight.labels(api)
        in_flight.inc()
        self._in_flight += 1
        self._look()
        try:
            yield
        finally:
            del self._tasks[outcome]
            self._in_flight -= 1
            self._look()
            in_flight.dec()

    def abort(self, id_: str, client: str | None = None) -> int:
        """Cancel the tasks of the requests inside that have this id, those of one client or of all, and say how many
        there are."""
        found = [
            outcome
            for outcome in self._tasks
            if outcome.id == id_ and not outcome.aborted and client in (None, outcome.client)
            if self._tasks[outcome] is not asyncio.current_task()  # who asks may have that id, too
        ]
        for outcome in found:
            outcome.aborted = True
            self._tasks[outcome].cancel()
        return len(found)

    def _record(self, api: str, method: str, outcome: Outcome, seconds: float) -> None:
        self._metrics.requests.labels(api, method, outcome.code).inc()
        self._metrics.seconds.labels(api, method).observe(seconds)
        shown = {"api": api, "method": method, "code": outcome.code, "seconds": round(seconds, 6)}
        shown |= {"id": outcome.id, "client": outcome.client, "cancelled": outcome.cancelled}
        access.info("%(api)s %(method)s %(code)s in %(seconds)s s, id %(id)s, client %(client)s", shown, extra=shown)
        if outcome.cancelled:
            self._metrics.cancelled.labels(api).inc()
        if outcome.truncated is not None:
            self._metrics.truncated.labels(api, outcome.truncated.value).inc()

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """While the body of a request, which is counted, has not arrived. Nobody waits for it to be idle."""
        self._receiving += 1
        self._look()
        try:
            yield
        finally:
            self._receiving -= 1
            self._look()

    @contextlib.contextmanager
    def share(self, client: str, sequences: int) -> Iterator[None]:
        """Take `sequences` of what one client may have running, and turns for them. Raises `TooManyError` if it has too
        many, `OverloadedError` if all together have, `BadRequestError` if it can never have so many."""
        if sequences > self._max_per_client:
            raise BadRequestError(
                f"{sequences} sequences in a request; expected at most {self._max_per_client}, what one client may "
                "have running (--max-sequences-per-client)"
            )
        try:
            self._check_room(self._sequences[client], sequences)
        except OverloadedError:
            self._metrics.rejected.inc()
            raise
        self._sequences[client] += sequences
        span = self._order.enter(client, sequences)
        taken = turns.enter(span.start, span.end)
        try:
            yield
        finally:
            self._order.leave(span, taken.have_begun)
            self._sequences[client] -= sequences
            if not self._sequences[client]:
                del self._sequences[client]

    def _check_room(self, running: int, sequences: int) -> None:
        """Raise `TooManyError` or `OverloadedError` unless a client that has `running` sequences may have more.

        The more is taken, the less one client may have of it, and so a newcomer finds room for a sequence however many
        greedy ones there are: dynamic thresholds (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998).
        """
        taken = self._sequences.total()
        free = self._max_of_all - taken
        has = f"this client has {running} sequences running and asks for {sequences} more"
        if running + sequences > self._max_per_client:
            raise TooManyError(f"{has}; expected at most {self._max_per_client} at a time (--max-sequences-per-client)")
        if sequences > free:
            raise OverloadedError(f"{has}; there is room for {free} now (--max-num-queued-reqs)")
        if taken and running + sequences > max(1, _GREED * (free - sequences)):
            raise TooManyError(
                f"{has}; there is room for {free} now (--max-num-queued-reqs), and one client may have {_GREED} times "
                "what that leaves to others"
            )

    def _look(self) -> None:
        if self._in_flight == self._receiving:
            self._idle.set()
        else:
            self._idle.clear()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is inside but what has not arrived whole. False when the time is up first."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
