"""Statistics that one-shot methods keep of a layer's inputs, and the factorisation of their Hessian.

`add_squares` keeps the diagonal of X^T X (Wanda, RIA), `add_gram` all of it (SparseGPT, ADMM), `add_drift` how far the
inputs have moved from those of the dense model. All sum over tokens in float32 whatever the model's dtype, add one
batch at a time, and update in place. TF32 must stay off (torch's default): a Gram matrix with ten bits is not positive
definite.

Legend: T = tokens, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgen.core.errors import NumericalError

_MAX_RETRY_DAMP = 0.1


@dataclass
class Gram:
    """The Gram matrix of a layer's inputs: `sum_II` is the float32 sum of x x^T over `tokens` tokens.

    For inputs that have moved from those of the dense model, `drift_II` is the float32 sum of (d - x) x^T, where d is
    what the layer receives of the same token in the dense model, and `missing_OI` that of e x^T, where e is what the
    layer's output is to make up for besides. They are None if nobody looked.
    """

    sum_II: Tensor
    tokens: int
    drift_II: Tensor | None = None
    missing_OI: Tensor | None = None


def add_squares(stats: Tensor | None, x_TI: Tensor) -> Tensor:
    """Add the inputs `x_TI` to the float32 sums of squares per input feature, `[I]` (None at first), and return
    these."""
    square_I = x_TI.square().sum(0)
    return square_I if stats is None else stats.add_(square_I)


def add_gram(stats: Gram | None, x_TI: Tensor) -> Gram:
    """Add the inputs `x_TI` to their Gram matrix (None at first), and return it."""
    if stats is None:
        size = x_TI.shape[1]
        stats = Gram(torch.zeros(size, size, dtype=torch.float32, device=x_TI.device), 0)
    stats.sum_II.addmm_(x_TI.T, x_TI)
    stats.tokens += x_TI.shape[0]
    return stats


def add_drift(stats: Gram, x_TI: Tensor, drift_TI: Tensor, missing_TO: Tensor | None) -> None:
    """Add what the inputs `x_TI` lack of those of the dense model, and what the outputs are to make up for besides."""
    stats.drift_II = _add_product(stats.drift_II, drift_TI, x_TI)
    if missing_TO is not None:
        stats.missing_OI = _add_product(stats.missing_OI, missing_TO, x_TI)


def _add_product(sum_OI: Tensor | None, y_TO: Tensor, x_TI: Tensor) -> Tensor:
    return y_TO.T @ x_TI if sum_OI is None else sum_OI.addmm_(y_TO.T, x_TI)


def aimed_at_dense(weight_OI: Tensor, stats: Gram, ridge: float) -> Tensor:
    """The weights whose outputs come nearest to what those of the dense model are, and to what is missing besides.

    With H the Gram matrix, the least-squares solution

        W + (W drift + missing) (H + ridge * diag(H))^-1

    which is W where nothing has drifted, and W itself if nobody looked. Raises `NumericalError` for sums that are no
    Gram matrix.
    """
    if stats.drift_II is None:
        return weight_OI
    missing_OI = weight_OI @ stats.drift_II
    if stats.missing_OI is not None:
        missing_OI += stats.missing_OI
    norm_I, _, unit_II = unit_features(stats.sum_II)
    return weight_OI + missing_OI / norm_I @ shifted_inverse(unit_II, ridge, "ridge") / norm_I


def unit_features(sum_II: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the features `[I]` (1 for dead ones), which are alive `[I]`, and the Gram matrix of unit features."""
    alive_I = sum_II.diagonal() > 0
    norm_I = sum_II.diagonal().sqrt().where(alive_I, 1.0)
    return norm_I, alive_I, sum_II / norm_I / norm_I[:, None]


def shifted_inverse(unit_II: Tensor, shift: float, option: str) -> Tensor:
    """(H + shift I)^-1 for a Gram matrix H of unit features, whose diagonal is about 1.

    So this is well conditioned unless H is no Gram matrix at all, which raises `NumericalError`; it names the `option`
    of the method that makes it more so.
    """
    shifted_II = unit_II.clone()
    shifted_II.diagonal().add_(shift)
    lower_II = cholesky(shifted_II)
    if lower_II is None:
        raise NumericalError(
            f"the Gram matrix of {unit_II.shape[0]} input features is not positive semi-definite; look for NaN or "
            f"infinity in the calibration inputs, or raise method.{option}"
        )
    return torch.cholesky_inverse(lower_II)


def cholesky(matrix_II: Tensor) -> Tensor | None:
    """Lower triangular L with L L^T = A, or None when A is not positive definite in its own precision."""
    lower_II, info = torch.linalg.cholesky_ex(matrix_II)
    return lower_II if info == 0 and torch.isfinite(lower_II).all() else None


def inverse_factor(hessian_II: Tensor, damp: float) -> Tensor:
    """Upper triangular U with (H + damp * mean(diag H) * I)^-1 = U^T U; more damping if the factorisation fails."""
    upper_II = damped_cholesky(hessian_II.flip(0, 1), damp).flip(0, 1)
    eye_II = torch.eye(hessian_II.shape[0], dtype=hessian_II.dtype, device=hessian_II.device)
    inverse_II: Tensor = torch.linalg.solve_triangular(upper_II, eye_II, upper=True)
    return inverse_II


def damped_cholesky(matrix_II: Tensor, damp: float) -> Tensor:
    """Lower triangular L with L L^T = A + damp * mean(diag A) * I, for a Hessian A `[I, I]`.

    If that fails, it is tried with more damping, up to a tenth of the mean diagonal (or `damp`, if that is more); then
    `NumericalError` is raised.
    """
    mean = matrix_II.diagonal().mean()
    damps = _damps(damp)
    for tried in damps:
        damped_II = matrix_II.clone()
        damped_II.diagonal().add_(tried * mean)
        lower_II = cholesky(damped_II)
        if lower_II is not None:
            return lower_II
    raise NumericalError(
        f"Cholesky factorisation of the {matrix_II.shape[0]} x {matrix_II.shape[0]} Hessian failed with damping "
        f"{damps}; raise method.damp or use more calibration samples"
    )


def _damps(damp: float) -> list[float]:
    """The dampings to try in turn: `damp`, then ten times the last one, up to `_MAX_RETRY_DAMP`."""
    damps = [damp]
    while damps[-1] < _MAX_RETRY_DAMP:
        more = damps[-1] * 10
        damps.append(more if more < _MAX_RETRY_DAMP * 0.999 else _MAX_RETRY_DAMP)
    return damps
