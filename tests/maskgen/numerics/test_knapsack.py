"""Knapsacks against every possible choice."""

from __future__ import annotations

import itertools
import random

import pytest

from maskgen.numerics.knapsack import knapsack


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_is_worth_more(seed: int) -> None:
    numbers = random.Random(seed)
    worth = [numbers.uniform(-0.2, 1.0) for _ in range(10)]
    weight = [numbers.choice([0, 576 * 576, 1536 * 576, -64]) for _ in range(10)]
    room = numbers.randrange(6 * 1536 * 576)
    taken = knapsack(worth, weight, room)

    def sums(choice: tuple[bool, ...] | list[bool]) -> tuple[float, int]:
        found = [(w, g) for w, g, is_taken in zip(worth, weight, choice, strict=True) if is_taken]
        return sum(w for w, _ in found), sum(g for _, g in found)

    best = max(sums(choice)[0] for choice in itertools.product([False, True], repeat=10) if sums(choice)[1] <= room)
    assert sums(taken)[1] <= room
    assert sums(taken)[0] == pytest.approx(best, abs=1e-9)


def test_without_room_nothing_that_weighs_is_taken() -> None:
    assert knapsack([1.0, 1.0, -1.0], [5, 0, 0], 0) == [False, True, False]
    assert knapsack([], [], 3) == []
