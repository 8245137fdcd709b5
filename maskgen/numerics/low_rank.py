"""The matrix of rank r that leaves least of a layer's output error, in closed form and by iteration.

A weight that is off by E puts out E x too little. Of all B A of rank r, the one that leaves least of it, min
tr((E - B A) H (E - B A)^T) with H the second moment of the inputs, follows from

    M = E H E^T  [O, O]        its r largest eigenvectors are the columns of B;   A = B^T E

`low_rank` solves that. `nearer_low_rank` improves on a B that is near already, by one step of orthogonal iteration,
B <- orth(M B), which never leaves more, and costs a few thin products in place of a matrix `[O, O]` and its
eigenvectors.

Source: Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
arXiv 2410.21271. The paper scales E by the eigenvectors and eigenvalues of H, takes the truncated SVD U S V^T of
E Q diag(sqrt(l)), and undoes the scaling: B A = U S V^T diag(1 / sqrt(l)) Q^T. The left singular vectors U are the
eigenvectors of M, and U S V^T = U U^T E Q diag(sqrt(l)), so that is U U^T E, which divides by no eigenvalue: inputs
that never occur, whose eigenvalue is 0, need no guard. With H = I it is the truncated SVD of E.

Legend: O = out features, I = in features, R = rank, N = the smaller of O and I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskgen.core.errors import NumericalError


def low_rank(error_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B `[O, R]`, whose columns are orthonormal, and A `[R, I]`, both float64, in the order of what they repair.

    With more outputs than inputs, E = Q R is factorised first and M made of R `[I, I]`. All is done in float64: M
    squares E, so in float32 what is small in E would be lost. Raises `NumericalError` for a moment that is not finite,
    or whose eigenvectors are not found.
    """
    error_NI, basis_ON = error_OI.double(), None
    if error_OI.shape[0] > error_OI.shape[1]:
        basis_ON, error_NI = torch.linalg.qr(error_NI)
    moment_NN = error_NI @ moment_II.double() @ error_NI.T
    if not torch.isfinite(moment_NN).all():
        raise NumericalError(
            f"the second moment of {error_OI.shape[1]} input features is not finite; look for NaN or infinity in "
            "the calibration inputs"
        )
    try:
        vectors_NN = torch.linalg.eigh((moment_NN + moment_NN.T) / 2).eigenvectors  # eigenvalues ascend
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            f"no eigenvectors of what is to be repaired beside {error_OI.shape[1]} input features: {error}; give more "
            "or other calibration text, or leave this layer dense (ignore)"
        ) from None
    out_NR = vectors_NN[:, -rank:].flip(1)
    return out_NR if basis_ON is None else basis_ON @ out_NR, out_NR.T @ error_NI


def nearer_low_rank(error_OI: Tensor, moment_II: Tensor, out_OR: Tensor) -> tuple[Tensor, Tensor]:
    """B and A that leave no more of E than the best A does beside the orthonormal `out_OR`, in the dtype of E."""
    moved_OR = error_OI @ (moment_II @ (error_OI.T @ out_OR))
    out_OR = torch.linalg.qr(moved_OR).Q
    return out_OR, out_OR.T @ error_OI
