"""Magnitude: the largest absolute values, ties to the lower column."""

from __future__ import annotations

import torch

from maskgen.core.pattern import NMPattern
from maskgen.methods.oneshot.magnitude import Magnitude


def test_keeps_the_largest_of_each_group() -> None:
    weight_OI = torch.tensor([[1.0, -5.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0], [-1, 1, -1, 1, 4, 3, -2, -9]])
    solution = Magnitude().solve(weight_OI, None, NMPattern(2, 4))
    expected = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(solution.mask, expected)
    assert solution.weight is None
    assert not Magnitude.needs_data
