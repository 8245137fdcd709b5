"""EoRA: the best correction of rank r for a layer's output error, in closed form.

A sparse layer with the served weight W' puts out (W - W') x = E x too little. Of all B A of rank r, it gets the one
that leaves least of it, min ||(E - B A) X||_F over the calibration inputs X (`maskgen.numerics.low_rank`).

With `asymmetric`, W is not the layer's own weight but what would put out what the layer puts out in the dense model,
from inputs that carry the errors of all layers before it (`maskgen.numerics.statistics.aimed_at_dense`).

Source: Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
arXiv 2410.21271.

Legend: T = tokens, O = out features, I = in features, R = rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import RecipeError
from maskgen.methods import Correction, Drift
from maskgen.methods.correction import CorrectionMethod
from maskgen.numerics.low_rank import low_rank
from maskgen.numerics.statistics import Gram, add_drift, add_gram, aimed_at_dense


@dataclass(frozen=True)
class EoRA(CorrectionMethod):
    """`rank`: R, the same for every layer, which then stores R * (O + I) more numbers. `asymmetric`: aim at what the
    dense model puts out, with this `ridge`.
    """

    rank: int = 16
    asymmetric: bool = False
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"method.rank {self.rank}: expected a positive number, such as 16")
        self.require_positive("ridge")

    @property
    def is_asymmetric(self) -> bool:
        """Whether `asymmetric` is set."""
        return self.asymmetric

    @property
    def correction(self) -> LowRankCorrection:
        """Of this rank."""
        return LowRankCorrection(self.rank)

    def observe(self, stats: Gram | None, x_TI: Tensor) -> Gram:
        """`stats` is the Gram matrix of the inputs, updated in place."""
        return add_gram(stats, x_TI)

    def observe_drift(self, stats: Gram, x_TI: Tensor, drift: Drift) -> Gram:
        """Its sums for the drift are updated in place, too."""
        add_drift(stats, x_TI, drift.input_TI, drift.stream_TO)
        return stats

    def solve(self, weight_OI: Tensor, served_OI: Tensor, stats: Gram) -> Correction:
        """B `[O, R]` with orthonormal columns as `out`, A `[R, I]` as `pool`."""
        error_OI = aimed_at_dense(weight_OI, stats, self.ridge) - served_OI
        out_OR, pool_RI = low_rank(error_OI, stats.sum_II.double() / stats.tokens, self.rank)
        return Correction(out_OR.float(), pool_RI.float())


METHOD = EoRA
