"""RIA: score a weight relative to the others of its row and of its column. One pass over data, no weight update.

Magnitude and Wanda can prune all of a channel whose weights are small throughout. Relative importance divides a weight
by the sum of its row and by that of its column. The norm of the input feature enters at a lower power than in Wanda,
because features with huge values would otherwise decide every group:

    score = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2^a,   a = 1/2

Sums run over the whole row (j) and the whole column (i), so rows are not independent: scaling one row changes every
column's sum. A row or column of zeros contributes 0.

The paper also permutes input channels so that strong ones fall into different groups: `maskgen permute` does that, for
this method or any other.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskgen.methods import ScoreMethod
from maskgen.numerics.statistics import add_squares


@dataclass(frozen=True)
class RIA(ScoreMethod):
    """`exponent`: the power a of the feature norms; 0 looks at weights only, 1 is Wanda's."""

    exponent: float = 0.5

    def __post_init__(self) -> None:
        self.require_not_negative("exponent")

    def observe(self, stats: Tensor | None, x_TI: Tensor) -> Tensor:
        """`stats` is the float32 sum of squares per input feature `[I]`."""
        return add_squares(stats, x_TI)

    def score(self, weight_OI: Tensor, stats: Tensor) -> Tensor:
        """Relative importance times a power of the feature norms."""
        size_OI = weight_OI.abs()
        relative_OI = _share(size_OI, dim=1) + _share(size_OI, dim=0)
        return relative_OI * stats.pow(self.exponent / 2)


def _share(size_OI: Tensor, dim: int) -> Tensor:
    """Each entry as a fraction of the sum along `dim`; 0 where that sum is."""
    total = size_OI.sum(dim, keepdim=True)
    return size_OI / total.masked_fill(total == 0, 1.0)


METHOD = RIA
