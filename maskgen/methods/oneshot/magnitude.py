"""Magnitude pruning: keep the largest |w| of every group. No data, no update.

The baseline every other method must beat. Positive scaling of a row does not change its mask.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from maskgen.methods import ScoreMethod


@dataclass(frozen=True)
class Magnitude(ScoreMethod):
    """score = |W_ij|."""

    needs_data: ClassVar[bool] = False

    def score(self, weight_OI: Tensor, stats: Any) -> Tensor:
        """Absolute values; `stats` is ignored."""
        return weight_OI.abs()


METHOD = Magnitude
