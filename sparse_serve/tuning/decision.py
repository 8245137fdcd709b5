"""From measured times to a plan: which kernel, or which two, serve a layer.

A kernel is judged by its time divided by that of the dense layer, at every measured number of tokens, in two ways:

    worst    the largest of these quotients. All below `SLACK` count as `SLACK`: two runs of the same code differ by so
             much, so such a kernel is as good as never slower than dense
    mean     their geometric mean

The best kernel is the one with the smallest worst, and of those that are equal there the one with the smallest mean. So
a kernel that is never slower than dense goes before one that is faster on the whole and slower somewhere.

Two kernels, the faster of them at each number of tokens, are judged in the same way. They need two layouts of the
weight in memory, so they are taken where a device may have two (GPUs, `LAYOUTS`) and only for a clear gain. Their worst
must not be larger than that of the best kernel alone, and must be better by more than `SLACK`, or their mean by more
than `PAIR_GAIN`. The first is for layers that every single kernel makes slower than dense somewhere. The second is for
layers that a pair makes slower as well: on an H200 with about 64 tokens both GPU kernels are slower than dense, however
they are paired; but with one token `skinny` is twice as fast as `cusparselt`, and with 512 a tenth as fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from sparse_serve.tuning.dispatch import Plan, Step
from sparse_serve.tuning.measure import DENSE

LAYOUTS = {"cuda": 2, "cpu": 1}
"""Most layouts of a weight in memory, by type of device. On a CPU one layout is made for every number of tokens."""

SLACK = 1.05
PAIR_GAIN = 1.1

Seconds = Mapping[int, Mapping[str, float]]
"""Seconds of one call, by number of tokens and name of the kernel or `dense`; the same names at every number."""


@dataclass(frozen=True)
class BucketChoice:
    """What serves up to `tokens` tokens, and more than the bucket before it.

    `kernel` is its name, `seconds` the time of one call with `tokens` tokens, and `speedup` the dense layer's time
    divided by that.
    """

    tokens: int
    kernel: str
    seconds: float
    speedup: float


def decide(seconds: Seconds, layouts: int = 2) -> tuple[BucketChoice, ...]:
    """The best kernel or, where there may be two `layouts`, pair of kernels, by the rule at the top of this file."""
    kernels = sorted(set(next(iter(seconds.values()))) - {DENSE})
    best = min(combinations(kernels, 1), key=lambda alone: _rank(seconds, alone))
    if layouts > 1:
        pairs = [pair for pair in combinations(kernels, 2) if _is_worth_it(seconds, pair, best)]
        best = min(pairs, key=lambda pair: _rank(seconds, pair), default=best)
    buckets = []
    for tokens, times in sorted(seconds.items()):
        kernel = min(best, key=lambda name: times[name])
        buckets.append(BucketChoice(tokens, kernel, times[kernel], times[DENSE] / times[kernel]))
    return tuple(buckets)


def plan_of(buckets: Sequence[BucketChoice]) -> Plan:
    """Buckets of the same kernel in a row become one step; the last one takes any number."""
    steps: list[Step] = []
    for bucket, after in zip(buckets, [*buckets[1:], None], strict=True):
        if after is None or after.kernel != bucket.kernel:
            steps.append(Step(bucket.tokens if after else None, bucket.kernel))
    return Plan(tuple(steps))


def _is_worth_it(seconds: Seconds, pair: tuple[str, ...], alone: tuple[str, ...]) -> bool:
    """Whether `pair` is enough better than a kernel `alone` to be worth a second layout of the weight."""
    (worst, logs), (worst_alone, logs_alone) = _rank(seconds, pair), _rank(seconds, alone)
    gain = math.exp((logs_alone - logs) / len(seconds))  # of the means
    return worst <= worst_alone and (worst * SLACK < worst_alone or gain > PAIR_GAIN)


def _rank(seconds: Seconds, kernels: tuple[str, ...]) -> tuple[float, float]:
    """Worst of `kernels`, see above, and the sum of the logarithms that their mean is made of. Smaller is better."""
    quotients = [min(times[name] for name in kernels) / times[DENSE] for times in seconds.values()]
    return max(SLACK, *quotients), sum(map(math.log, quotients))
