"""Magnitude pruning: keep the largest |w| of every group. No data, no update.

The baseline every other method must beat. Positive scaling of a row does not change its mask.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from maskgen.core.pattern import NMPattern
from maskgen.method import LocalMethod, Solution


@dataclass(frozen=True)
class Magnitude(LocalMethod):
    """score = |W_ij|."""

    needs_data: ClassVar[bool] = False

    def solve(self, weight_OI: Tensor, stats: Any, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """Mask by absolute value; `stats` is ignored."""
        return Solution(pattern.mask_from_scores(weight_OI.abs()))


METHOD = Magnitude
