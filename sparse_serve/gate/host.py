"""Was the host quiet while speed was measured? What disturbs a measurement without showing in its numbers.

Three signs: time that the hypervisor gave to others (steal), processor time of processes that are not the gate's, and a
fixed computation that takes another time than in the other rounds (a clock that changes, a throttled processor, a
neighbour on the same cache).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Sequence

import numpy as np
import psutil

from sparse_serve.gate import wording
from sparse_serve.gate.evidence import HostReading

MAX_STEAL = 0.02
MAX_FOREIGN = 0.15
MAX_DRIFT = 0.25
"""Above these shares a round is not used: of steal, of other processes, of the probe's time from its median."""

_PROBE_ROUNDS = 5


def contamination(readings: Sequence[HostReading | None]) -> list[str | None]:
    """Why each round cannot be used to judge speed; None for those that can, or whose host nobody watched."""
    known = [_fastest(reading) for reading in readings if reading is not None]
    usual = statistics.median(known) if known else 0.0
    return [None if reading is None else _problem(reading, usual) for reading in readings]


def _problem(reading: HostReading, usual: float) -> str | None:
    if reading.steal > MAX_STEAL:
        return f"{wording.percent(reading.steal, 0)} of the processors' time was stolen by other virtual machines"
    if reading.foreign > MAX_FOREIGN:
        return f"other processes used {wording.percent(reading.foreign, 0)} of the processors"
    drift = _fastest(reading) / usual - 1
    if abs(drift) > MAX_DRIFT:
        return f"the time of a fixed computation was {wording.said('slowdown', drift)} than usual"
    return None


def _fastest(reading: HostReading) -> float:
    return min(reading.probe_s)


class HostWatch:
    """Reads the host over one round: make it before, call `probe` before each run, and `read` at the end.

    `pids` are servers on this host that somebody else started; they, this process and all below them are not foreign.
    """

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._own = [os.getpid(), *pids]
        self._began, self._times, self._own_s = time.monotonic(), psutil.cpu_times(), self._own_seconds()
        self._probes: list[float] = []

    def probe(self) -> None:
        """Time a fixed computation: the fastest of a few goes, some milliseconds in all."""
        matrix = np.arange(96.0 * 96.0).reshape(96, 96) / 9216.0
        taken = []
        for _ in range(_PROBE_ROUNDS):
            began = time.perf_counter()
            for _ in range(20):
                matrix @ matrix
            taken.append(time.perf_counter() - began)
        self._probes.append(min(taken))

    def read(self) -> HostReading:
        """What went on since this was made. `probe` must have been called."""
        now = psutil.cpu_times()
        capacity_s = max(time.monotonic() - self._began, 1e-3) * (os.cpu_count() or 1)
        steal_s = getattr(now, "steal", 0.0) - getattr(self._times, "steal", 0.0)
        busy_s = _busy(now) - _busy(self._times)
        own_s = self._own_seconds() - self._own_s
        return HostReading(
            steal=min(max(steal_s / capacity_s, 0.0), 1.0),
            foreign=min(max((busy_s - own_s) / capacity_s, 0.0), 1.0),
            probe_s=tuple(self._probes),
        )

    def _own_seconds(self) -> float:
        """Processor time of the gate's processes, those that ended included where their parent is one of them."""
        found: set[psutil.Process] = set()
        for pid in self._own:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(pid)
                found |= {top, *top.children(recursive=True)}
        total = 0.0
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total


def _busy(times: object) -> float:
    """Seconds in which a processor did something, for whomever."""
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
