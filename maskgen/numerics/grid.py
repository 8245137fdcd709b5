"""Rounding kept weights to a grid so that the layer's outputs change as little as possible.

The codes c of a layer, with a step for each kept weight, are chosen to make

    (Q - W) H (Q - W)^T,    Q = c * step where a weight is kept and 0 elsewhere,    H = X^T X + damping

small for each row. Two ways are taken, one after the other, and neither needs a factorisation for each row:

    error feedback      columns from left to right; with U the upper Cholesky factor of H^-1, d its diagonal, and e_j
                        the error of column j by d_j, the columns after it become W[:, j+1:] -= e_j U[j, j+1:]. A pruned
                        weight has only 0 on its grid: what earlier columns put on it is handed on too.
    descent             kept codes one column at a time, each to the point of its grid that is best while all others
                        stay. The first way spreads errors over columns that will be pruned, as if these could keep
                        them; this one knows which are, and never makes the sum worse.

Sources: Frantar et al., "GPTQ", ICLR 2023, and "SparseGPT" (joint sparsification and quantisation), ICML 2023; for the
descent Behdin et al., "QuantEase", 2023 (arXiv 2309.01885).

Legend: O = out features, I = in features, B = columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskgen.numerics.statistics import inverse_factor

BLOCK = 128
DAMP = 0.01
PASSES = 3

Nearest = Callable[[Tensor, Tensor], Tensor]
"""Weights and steps, of one shape, to the nearest codes (floats)."""


def round_to_grid(weight_OI: Tensor, mask_OI: Tensor, step_OI: Tensor, gram_II: Tensor, nearest: Nearest) -> Tensor:
    """The codes of a float32 weight as floats `[O, I]`, 0 where pruned; no argument is changed.

    `gram_II` is the Gram matrix of the layer's inputs. Raises `NumericalError` if it cannot be factorised.
    """
    weight_IO, mask_IO, step_IO = (part.T.contiguous() for part in (weight_OI, mask_OI, step_OI))
    hessian_II = gram_II / gram_II.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    dead_I = hessian_II.diagonal() == 0
    hessian_II.diagonal()[dead_I] = 1.0
    codes_IO = _feedback(weight_IO, mask_IO, step_IO, inverse_factor(hessian_II, DAMP), nearest)
    hessian_II.diagonal().add_(DAMP * hessian_II.diagonal().mean())
    _descend(codes_IO, weight_IO, mask_IO, step_IO, hessian_II, nearest)
    return codes_IO.T


def _feedback(weight_IO: Tensor, mask_IO: Tensor, step_IO: Tensor, factor_II: Tensor, nearest: Nearest) -> Tensor:
    left_IO, codes_IO = weight_IO.clone(), torch.zeros_like(weight_IO)
    for start in range(0, len(weight_IO), BLOCK):
        stop = min(start + BLOCK, len(weight_IO))
        error_BO = torch.empty_like(left_IO[start:stop])
        for column in range(start, stop):
            torch.mul(nearest(left_IO[column], step_IO[column]), mask_IO[column], out=codes_IO[column])
            error_O = left_IO[column].addcmul(codes_IO[column], step_IO[column], value=-1)
            error_BO[column - start] = error_O.div_(factor_II[column, column])
            left_IO[column + 1 : stop].addr_(factor_II[column, column + 1 : stop], error_BO[column - start], alpha=-1)
        left_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_BO, alpha=-1)
    return codes_IO


def _descend(
    codes_IO: Tensor, weight_IO: Tensor, mask_IO: Tensor, step_IO: Tensor, hessian_II: Tensor, nearest: Nearest
) -> None:
    """Better codes, in place."""
    slope_IO = hessian_II @ (codes_IO * step_IO - weight_IO)
    for _ in range(PASSES):
        for start in range(0, len(weight_IO), BLOCK):
            stop = min(start + BLOCK, len(weight_IO))
            change_BO = torch.empty_like(slope_IO[start:stop])
            for column in range(start, stop):
                step_O, before_O = step_IO[column], codes_IO[column].clone()
                best_O = (before_O * step_O).sub_(slope_IO[column] / hessian_II[column, column])
                torch.mul(nearest(best_O, step_O), mask_IO[column], out=codes_IO[column])
                torch.mul(codes_IO[column] - before_O, step_O, out=change_BO[column - start])
                slope_IO[start:stop].addr_(hessian_II[start:stop, column], change_BO[column - start])
            slope_IO[:start].addmm_(hessian_II[:start, start:stop], change_BO)
            slope_IO[stop:].addmm_(hessian_II[stop:, start:stop], change_BO)
