"""What tests of kernels compare with: a dense product in float64, on fresh random numbers.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskgen.core.int4 import GROUPS
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, INT4, KINDS

PATTERN = NMPattern(2, 4)
STORED = [(values, group) for values in KINDS for group in (GROUPS if values == INT4 else (None,))]
"""How kept values may be stored, and how many share a scale; None: those of a row."""

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Of the sum of the absolute terms: what an output rounded once may be off by, and as much again for its sum."""


def packed_weight(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
    values: str = FLOAT,
    group: int | None = None,
    device: str = "cpu",
) -> PackedTensor:
    """A random weight under a random mask, of a size that leaves outputs about as large as inputs.

    Of int4 values, `group` share a scale, and scales differ by powers of two within a row.
    """
    weight_OI = torch.randn(rows, columns, device=device).mul_(columns**-0.5).to(dtype)
    mask_OI = PATTERN.mask_from_scores(torch.rand(rows, columns, device=device))
    packed = PackedTensor.pack(weight_OI, mask_OI, PATTERN).quantised(values, group)
    if packed.scale is not None and packed.group is not None:
        packed.scale.mul_(2.0 ** (torch.arange(packed.scale.shape[1], device=device) % 4 - 2))
    return packed


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
