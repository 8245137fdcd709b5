"""Masked-dense weights: an ordinary `<module>.weight` `[O, I]` with zeros in it, as pruning scripts leave it, of floats
or of 8-bit codes with `<module>.weight_scale`.

The mask is where the weight is not zero, and in groups with fewer than n of those also at the first columns that are
zero, so that every group keeps exactly n. The packed weight stands for the same numbers, but that -0 becomes +0 where
it is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskgen.core.mask import pack_bits
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, kind_of
from maskgen.export.foreign import QUANTISED, TWO_FOUR, ForeignLayer

CODES = ("I8", "F8_E4M3")


@dataclass(frozen=True)
class Masked(ForeignLayer):
    """A weight with zeros, stored as if it were dense; compared with `pattern`."""

    FOUND: ClassVar[str] = "masked-dense weights"

    pattern: NMPattern = TWO_FOUR

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `ForeignLayer.tensors`."""
        return self.stored(".weight", *QUANTISED)

    def packed(self) -> PackedTensor | None:
        """See `ForeignLayer.packed`."""
        weight_OI = self.source.tensor(self.name + ".weight")
        mask_OI = mask_of(nonzeros(weight_OI), self.pattern)
        if mask_OI is None:
            return None
        if kind_of(weight_OI.dtype, self.name) == FLOAT:
            return PackedTensor.pack(weight_OI, mask_OI, self.pattern, self.name)
        kept_OV = weight_OI.view(torch.int8)[mask_OI].reshape(self.shape[0], self.pattern.kept_columns(self.shape[1]))
        packed = PackedTensor(kept_OV.view(weight_OI.dtype), pack_bits(mask_OI), self.pattern, self.row_scale())
        packed.verify(f"{self.source.path}: {self.name}")
        return packed

    def dense(self) -> Tensor:
        """See `ForeignLayer.dense`."""
        weight_OI = self.source.tensor(self.name + ".weight")
        if kind_of(weight_OI.dtype, self.name) == FLOAT:
            return weight_OI
        dense_OI = weight_OI.float() * self.row_scale()[:, None]
        if not dense_OI.isfinite().all():
            raise self.refuse("codes or scales that are no finite numbers")
        return dense_OI.to(self.source.dtype)


def nonzeros(weight_OI: Tensor) -> Tensor:
    """Bool `[O, I]`: where a weight, or the number a code stands for, is not zero. NaN is not."""
    if weight_OI.dtype == torch.float8_e4m3fn:
        return weight_OI.view(torch.uint8).bitwise_and(0x7F).ne(0)
    return weight_OI.ne(0)


def mask_of(nonzero_OI: Tensor, pattern: NMPattern) -> Tensor | None:
    """The mask that keeps every True of `nonzero_OI` and exactly n of each group; None if a group has more, or the
    columns do not divide into groups."""
    if nonzero_OI.shape[1] % pattern.column_multiple:
        return None
    per_group = nonzero_OI.reshape(nonzero_OI.shape[0], -1, pattern.m).sum(-1, dtype=torch.uint8)
    return None if int(per_group.max()) > pattern.n else pattern.mask_from_scores(nonzero_OI.float())
