"""Wanda: multiply each |w| by the norm of its input feature. One pass over calibration data, no weight update.

A weight that multiplies a large input changes the output more: score = |W_ij| * ||X_j||_2, the norm of input feature j
over all calibration tokens. The sum of squares is kept in float32 whatever the model's dtype; any positive constant in
front of the norms is irrelevant, so they are not divided by the number of tokens.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskgen.methods import ScoreMethod
from maskgen.numerics.statistics import add_squares


@dataclass(frozen=True)
class Wanda(ScoreMethod):
    """score = |W_ij| * ||X_j||_2."""

    def observe(self, stats: Tensor | None, x_TI: Tensor) -> Tensor:
        """`stats` is the float32 sum of squares per input feature `[I]`."""
        return add_squares(stats, x_TI)

    def score(self, weight_OI: Tensor, stats: Tensor) -> Tensor:
        """|W| times the feature norms."""
        return weight_OI.abs() * stats.sqrt()


METHOD = Wanda
