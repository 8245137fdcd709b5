"""What tests of kernels compare with: a dense product in float64, on fresh random numbers.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT

PATTERN = NMPattern(2, 4)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Of the sum of the absolute terms: what an output rounded once may be off by, and as much again for its sum."""


def packed_weight(
    rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, values: str = FLOAT, device: str = "cpu"
) -> PackedTensor:
    """A random weight under a random mask, of a size that leaves outputs about as large as inputs."""
    weight_OI = torch.randn(rows, columns, device=device).mul_(columns**-0.5).to(dtype)
    mask_OI = PATTERN.mask_from_scores(torch.rand(rows, columns, device=device))
    return PackedTensor.pack(weight_OI, mask_OI, PATTERN).quantised(values)


def assert_is_product(
    y_TO: Tensor, x_TI: Tensor, packed: PackedTensor, bias_O: Tensor | None = None, slack: float = 1
) -> None:
    """`y = x W^T + b` for the weight that is stored, within `slack` times the tolerance of x's dtype."""
    weight_OI = packed.unpack().double()
    bias = torch.zeros(len(weight_OI), device=y_TO.device).double() if bias_O is None else bias_O.double()
    expected_TO = x_TI.double() @ weight_OI.T + bias
    size_TO = x_TI.double().abs() @ weight_OI.abs().T + bias.abs() + 1e-3
    assert y_TO.dtype == x_TI.dtype and y_TO.shape == expected_TO.shape
    off_TO = (y_TO.double() - expected_TO).abs() / size_TO
    assert (off_TO <= slack * TOLERANCE[x_TI.dtype]).all(), f"off by {off_TO.max().item():.2e} of the terms"
