"""The knapsack problem: which things to take, for the greatest worth within a weight.

By dynamic programming over whole weights: row by row, the greatest worth within each weight up to the room. (HiGHS, by
way of scipy, finds the same, but writes messages of its own to standard output on the way.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MOST_UNITS = 100_000
"""The room is counted in at most so many units; finer weights are rounded up to whole units."""


def knapsack(worth: Sequence[float], weight: Sequence[int], room: int) -> list[bool]:
    """Whether to take each thing: the greatest sum of `worth` whose sum of `weight` is at most `room`.

    Things of no worth are left. A weight below 0 makes room. Exact, but for the rounding of weights to `MOST_UNITS`.
    """
    taken = [one < 0 for one in weight]  # to leave one of these is to take a thing of the opposite worth and weight
    room -= sum(one for one in weight if one < 0)
    gain = np.where(taken, -np.asarray(worth, dtype=np.float64), np.asarray(worth, dtype=np.float64))
    unit = math.gcd(*weight) or 1
    unit *= max(1, math.ceil(room // unit / MOST_UNITS))
    units, limit = [-(-abs(one) // unit) for one in weight], room // unit
    best, better = np.zeros(limit + 1), np.zeros((len(worth), limit + 1), dtype=bool)
    for index, (one, size) in enumerate(zip(gain, units, strict=True)):
        if one > 0 and size <= limit:
            with_it = best[: limit + 1 - size] + one
            better[index, size:] = with_it > best[size:]
            best[size:] = np.maximum(best[size:], with_it)
    for index in reversed(range(len(worth))):
        if better[index, limit]:
            taken[index], limit = not taken[index], limit - units[index]
    return taken
