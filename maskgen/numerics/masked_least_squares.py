"""The best values of the weights that a mask keeps, for all rows of a layer at once.

Each row of W, 0 where pruned, is to make (w - t)^T H (w - t) small for its target t. Exact solutions need one
factorisation per row. Conjugate gradients on the mask need products with H only, `steps` of them for all rows
together, and with every step the sum falls or stays.

Source: Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952; for weights beside a
mask Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
arXiv 2406.07831.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from torch import Tensor


def solve_on_mask(target_OI: Tensor, start_OI: Tensor, mask_OI: Tensor, hessian_II: Tensor, steps: int) -> Tensor:
    """Better weights than `start_OI`, which is 0 outside of `mask_OI`, as they are, too. `hessian_II` is positive
    semi-definite; features of the same size converge in the fewest steps."""
    solved_OI = start_OI
    left_OI = ((target_OI - start_OI) @ hessian_II) * mask_OI
    direction_OI, size_O1 = left_OI, left_OI.square().sum(1, keepdim=True)
    for _ in range(steps):
        change_OI = (direction_OI @ hessian_II) * mask_OI
        step_O1 = _ratio(size_O1, (direction_OI * change_OI).sum(1, keepdim=True))
        solved_OI = solved_OI + step_O1 * direction_OI
        left_OI = left_OI - step_O1 * change_OI
        before_O1, size_O1 = size_O1, left_OI.square().sum(1, keepdim=True)
        direction_OI = left_OI + _ratio(size_O1, before_O1) * direction_OI
    return solved_OI


def _ratio(value_O1: Tensor, by_O1: Tensor) -> Tensor:
    """0 for rows where nothing is left to gain, so that there is nothing to divide by."""
    return (value_O1 / by_O1).where(by_O1 > 0, 0.0)
