"""One N:M sparse weight in memory: the kept values and the bitmask that says where they belong.

    weight  [O, I]        a  0  0  b | 0  c  d  0        bitmask byte 0b01101001 (column 0 is the lowest bit)
    values  [O, I*n/m]    a  b  c  d                     in column order, row by row

For 2:4 in bfloat16 that is 8 + 1 bits per weight instead of 16: 0.5625 of the dense bytes. A pruned entry unpacks to
+0. A kept value may itself be zero, which is why the mask is stored and never guessed from the values.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgen.core.errors import FormatError, NumericalError, PatternError
from maskgen.core.mask import check_bits, pack_bits, unpack_bits
from maskgen.core.pattern import NMPattern

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PackedTensor:
    """`values` `[O, I*n/m]` (bf16, fp16 or fp32) and `bitmask` uint8 `[O, I/8]` of one weight `[O, I]`."""

    values: Tensor
    bitmask: Tensor
    pattern: NMPattern

    @classmethod
    def pack(cls, weight_OI: Tensor, mask_OI: Tensor, pattern: NMPattern, name: str = "weight") -> PackedTensor:
        """Keep `weight_OI` where `mask_OI` is True. The weight's values are copied bit for bit.

        Raises `PatternError` (shape, mask), `NumericalError` (a kept value is not finite), `FormatError` (dtype).
        """
        if weight_OI.dtype not in VALUE_DTYPES:
            raise FormatError(f"{name}: dtype {weight_OI.dtype}, expected one of {list(VALUE_DTYPES)}")
        if weight_OI.shape != mask_OI.shape or weight_OI.ndim != 2:
            raise PatternError(f"{name}: weight {tuple(weight_OI.shape)} and mask {tuple(mask_OI.shape)} differ")
        pattern.check_columns(weight_OI.shape[1], name)
        pattern.check_mask(mask_OI, name)
        values = weight_OI.masked_select(mask_OI).reshape(weight_OI.shape[0], pattern.kept_columns(weight_OI.shape[1]))
        if not torch.isfinite(values).all():
            raise NumericalError(f"{name}: kept weights hold NaN or infinity; the model itself is damaged")
        return cls(values, pack_bits(mask_OI), pattern)

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)` of the weight this stands for."""
        return self.bitmask.shape[0], self.bitmask.shape[1] * 8

    @property
    def nbytes(self) -> int:
        """Bytes of values and bitmask."""
        return self.values.nbytes + self.bitmask.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes the dense weight would take in the same dtype."""
        return self.shape[0] * self.shape[1] * self.values.element_size()

    def mask(self) -> Tensor:
        """The bool mask `[O, I]`."""
        return unpack_bits(self.bitmask)

    def unpack(self) -> Tensor:
        """The dense weight `[O, I]`, +0 where pruned."""
        return unpack(self.values, self.bitmask)

    def verify(self, name: str = "weight") -> None:
        """Raise `FormatError` unless dtypes, shapes and every group's bit count are right."""
        if self.values.dtype not in VALUE_DTYPES or self.bitmask.dtype != torch.uint8:
            raise FormatError(
                f"{name}: values {self.values.dtype}, bitmask {self.bitmask.dtype}; expected one of "
                f"{list(VALUE_DTYPES)} and uint8"
            )
        check_shapes(list(self.values.shape), list(self.bitmask.shape), self.pattern, name)
        check_bits(self.bitmask, self.pattern, name)


def unpack(values: Tensor, bitmask: Tensor) -> Tensor:
    """Values `[O, I*n/m]` and bitmask `[O, I/8]`, or the same rows of both, to dense `[O, I]`, +0 where pruned."""
    mask_OI = unpack_bits(bitmask)
    return torch.zeros(mask_OI.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask_OI, values)


def check_shapes(values_shape: list[int], bitmask_shape: list[int], pattern: NMPattern, name: str) -> None:
    """Check that stored shapes belong together, before any byte of the tensors is read."""
    if len(values_shape) != 2 or len(bitmask_shape) != 2 or min(*values_shape, *bitmask_shape) < 1:
        raise FormatError(f"{name}: values {values_shape} and bitmask {bitmask_shape}: expected two non-empty matrices")
    out_features, in_features = bitmask_shape[0], bitmask_shape[1] * 8
    if in_features % pattern.m or values_shape != [out_features, pattern.kept_columns(in_features)]:
        raise FormatError(
            f"{name}: values {values_shape} do not match bitmask {bitmask_shape} under pattern {pattern}: a weight "
            f"[{out_features}, {in_features}] keeps [{out_features}, {pattern.kept_columns(in_features)}]"
        )
