"""Timing that compares fairly on a machine that is not quiet.

Candidates take turns, so that a slow moment hits all of them, and what is compared is the ratio within a round. Every
candidate has several copies of its weights and uses them in turn, so that none finds its weights in a cache because it
was just there: together they are larger than the caches.

How a call is timed is a function, `Clock`: by default `wall_s`, the clock on the wall. Work on a GPU is timed by the
GPU (`gpu_s`), which leaves out what launching it and waiting for its end cost the host.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

Clock = Callable[[Call], float]
"""Runs a call and returns how many seconds it took."""


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by candidate; equally many for each."""

    seconds: Mapping[str, Sequence[float]]

    def median_s(self, name: str) -> float:
        """Its typical time."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, peers: Sequence[str]) -> float:
        """Median over rounds of the time of the fastest of `peers` by the time of `name`."""
        rounds = zip(*(self.seconds[peer] for peer in peers), strict=True)
        return statistics.median(min(peer) / mine for peer, mine in zip(rounds, self.seconds[name], strict=True))


@contextlib.contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Inside, torch computes with `number` threads; None leaves it as it is. What it was before comes back after."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wall_s(call: Call) -> float:
    """By the clock on the wall."""
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


def gpu_s(call: Call) -> float:
    """Between two events on the current CUDA stream, around what `call` puts there."""
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def _warm_up(copies: Sequence[Call], budget_s: float) -> None:
    """Run the first, and the others while there is time."""
    started_s = time.perf_counter()
    for number, call in enumerate(copies):
        if number and time.perf_counter() - started_s > budget_s:
            return
        call()


def interleaved(
    candidates: Mapping[str, Sequence[Call]], budget_s: float, least: int = 9, most: int = 200, clock: Clock = wall_s
) -> Times:
    """Run the copies of every candidate in turn until `budget_s` is spent, but at least `least` rounds.

    Before, every copy runs once, unless those of a candidate take longer than its share of `budget_s`: what a first
    call costs is then little of any call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for copies in candidates.values():
        _warm_up(copies, budget_s / len(candidates))
    started_s, names = time.perf_counter(), list(candidates)
    for turn in range(most):
        if turn >= least and time.perf_counter() - started_s > budget_s:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(clock(candidates[name][turn % len(candidates[name])]))
    return Times(seconds)
