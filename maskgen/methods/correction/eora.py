"""EoRA: the best correction of rank r for a layer's output error, in closed form.

A sparse layer with the served weight W' puts out (W - W') x = E x too little. Of all B A of rank r, the one that leaves
least of it, min ||(E - B A) X||_F over the calibration inputs X, follows from their second moment H = X X^T:

    M = E H E^T  [O, O]        its r largest eigenvectors are the columns of B;   A = B^T E

The paper scales E by the eigenvectors and eigenvalues of H, takes the truncated SVD U S V^T of E Q diag(sqrt(l)), and
undoes the scaling: B A = U S V^T diag(1 / sqrt(l)) Q^T. The left singular vectors U are the eigenvectors of M, and
U S V^T = U U^T E Q diag(sqrt(l)), so that is U U^T E, which divides by no eigenvalue: inputs that never occur, whose
eigenvalue is 0, need no guard. With H = I it is the truncated SVD of E. With the full rank it is E itself.

With `asymmetric`, W is not the layer's own weight but what would put out what the layer puts out in the dense model,
from inputs that carry the errors of all layers before it (`maskgen.numerics.statistics.aimed_at_dense`).

With more outputs than inputs, E = Q R is factorised first and M made of R `[I, I]`. All is done in float64: M squares
E, so in float32 what is small in E would be lost. Rows of A and columns of B are in the order of what they repair.

Source: Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
arXiv 2410.21271.

Legend: T = tokens, O = out features, I = in features, R = rank, N = the smaller of O and I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import NumericalError, RecipeError
from maskgen.methods import Correction, Drift
from maskgen.methods.correction import CorrectionMethod
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
        error_NI, basis_ON = error_OI.double(), None
        if error_OI.shape[0] > error_OI.shape[1]:
            basis_ON, error_NI = torch.linalg.qr(error_NI)
        moment_NN = error_NI @ (stats.sum_II.double() / stats.tokens) @ error_NI.T
        if not torch.isfinite(moment_NN).all():
            raise NumericalError(
                f"the second moment of {error_OI.shape[1]} input features is not finite; look for NaN or infinity in "
                "the calibration inputs"
            )
        vectors_NN = torch.linalg.eigh((moment_NN + moment_NN.T) / 2).eigenvectors  # eigenvalues ascend
        out_NR = vectors_NN[:, -self.rank :].flip(1)
        out_OR = out_NR if basis_ON is None else basis_ON @ out_NR
        return Correction(out_OR.float(), (out_NR.T @ error_NI).float())


METHOD = EoRA
