"""The knapsack problem: which things to take, for the greatest worth within a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def knapsack(worth: Sequence[float], weight: Sequence[int], room: int) -> list[bool]:
    """Whether to take each thing: the greatest sum of `worth` whose sum of `weight` is at most `room` (>= 0).

    Things of no worth are left, and those of no weight taken if they are worth something; a weight below 0 makes room.
    Solved exactly, as an integer program (HiGHS).
    """
    if not worth:
        return []
    unit = math.gcd(*weight) or 1
    weights, limit = [one // unit for one in weight], room // unit
    found = milp(
        -np.asarray(worth, dtype=np.float64),
        integrality=np.ones(len(worth)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.asarray([weights], dtype=np.float64), ub=limit),
        options={"mip_rel_gap": 0.0},
    )
    taken = [bool(one > 0.5) for one in found.x]
    assert sum(one for one, is_taken in zip(weights, taken, strict=True) if is_taken) <= limit
    return taken
