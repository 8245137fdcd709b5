"""One N:M sparse weight in memory: the kept values and the bitmask that says where they belong.

    weight  [O, I]        a  0  0  b | 0  c  d  0        bitmask byte 0b01101001 (column 0 is the lowest bit)
    values  [O, I*n/m]    a  b  c  d                     in column order, row by row

For 2:4 in bfloat16 that is 8 + 1 bits per weight instead of 16: 0.5625 of the dense bytes; with values of 8 bits it is
4 + 1: 0.3125, and with int4 ones 2 + 1 and a little for scales. A pruned entry unpacks to +0. A kept value may itself
be zero, which is why the mask is stored and never guessed from the values. `StoredLayer` adds what a method may store
beside the weight: a small dense `Correction`.

Legend: O = out features, I = in features, K = columns of a correction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maskgen.core.errors import FormatError, NumericalError, PatternError
from maskgen.core.int4 import group_of, scale_shape
from maskgen.core.mask import check_bits, pack_bits, unpack_bits
from maskgen.core.pattern import NMPattern
from maskgen.core.values import (
    FLOAT,
    FLOAT_DTYPES,
    INT4,
    check_codes,
    check_scale,
    from_codes,
    kind_of,
    per_byte,
    to_codes,
)

_BYTES_AT_A_TIME = 1 << 15
"""Bytes of a bitmask that are unpacked at a time on a CPU."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PackedTensor:
    """`values` `[O, I*n/m]` and `bitmask` uint8 `[O, I/8]` of one weight `[O, I]`.

    `values` are bf16, fp16 or fp32; or int8 or float8_e4m3fn codes, and then `scale` float32 `[O]` goes with them. Of
    int4 codes there are two in each element, uint8 `[O, I*n/m/2]`, and `scale` is `[O]`, or `[O, S]` with one for each
    group.
    """

    values: Tensor
    bitmask: Tensor
    pattern: NMPattern
    scale: Tensor | None = None

    @classmethod
    def pack(cls, weight_OI: Tensor, mask_OI: Tensor, pattern: NMPattern, name: str = "weight") -> PackedTensor:
        """Keep `weight_OI` where `mask_OI` is True. The weight's values are copied bit for bit.

        Raises `PatternError` (shape, mask), `NumericalError` (a kept value is not finite), `FormatError` (dtype).
        """
        if weight_OI.dtype not in FLOAT_DTYPES:
            raise FormatError(f"{name}: dtype {weight_OI.dtype}, expected one of {list(FLOAT_DTYPES)}")
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
    def kind(self) -> str:
        """How the values are stored: `float`, `int8`, `fp8_e4m3` or `int4`."""
        return kind_of(self.values.dtype)

    @property
    def group(self) -> int | None:
        """How many kept values share a scale, of int4; None where there is one a row, or none."""
        if self.kind != INT4 or self.scale is None:
            return None
        return group_of(self.values.shape[1] * per_byte(INT4), list(self.scale.shape))

    @property
    def kept(self) -> Tensor:
        """The numbers `[O, I*n/m]` that the values stand for: themselves, or of codes float32."""
        return self.values if self.scale is None else from_codes(self.values, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of values, bitmask and scale."""
        return self.values.nbytes + self.bitmask.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dense_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes the dense weight would take in `dtype`."""
        return self.shape[0] * self.shape[1] * dtype.itemsize

    def mask(self) -> Tensor:
        """The bool mask `[O, I]`."""
        return unpack_bits(self.bitmask)

    def unpack(self) -> Tensor:
        """The dense weight `[O, I]`, +0 where pruned; in float32 if the values are quantised."""
        return unpack(self.values, self.bitmask, self.scale)

    def to(self, device: str) -> PackedTensor:
        """The same weight on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, values=self.values.to(device), bitmask=self.bitmask.to(device), scale=scale)

    def quantised(self, kind: str, group: int | None = None) -> PackedTensor:
        """The same weight with values of `kind`: itself if they are that already; `FormatError` from another code.

        Of int4, `group` values share a scale, or with None those of a row.
        """
        if kind == self.kind and (kind != INT4 or self._has_group(group)):
            return self
        if self.kind != FLOAT or kind == FLOAT:
            raise FormatError(f"values {self.kind} cannot become {kind}: quantise the checkpoint they were made from")
        codes, scale = to_codes(self.values, kind, group)
        return PackedTensor(codes, self.bitmask, self.pattern, scale)

    def _has_group(self, group: int | None) -> bool:
        kept = self.values.shape[1] * per_byte(INT4)
        return self.scale is not None and list(self.scale.shape) == scale_shape(self.shape[0], kept, group)

    def verify(self, name: str = "weight") -> None:
        """Raise `FormatError` unless dtypes, shapes, codes, scales and every group's bit count are right."""
        if self.bitmask.dtype != torch.uint8:
            raise FormatError(f"{name}: bitmask {self.bitmask.dtype}, expected uint8")
        in_a_byte = per_byte(kind_of(self.values.dtype, name))
        check_shapes(list(self.values.shape), list(self.bitmask.shape), self.pattern, name, in_a_byte)
        self.verify_numbers(name)
        check_bits(self.bitmask, self.pattern, name)

    def verify_numbers(self, name: str = "weight") -> None:
        """The part of `verify` that reads values: codes and scales, or that none is NaN or infinite."""
        check_scale(self.scale, self.values, name)
        check_codes(self.values, name)
        if self.scale is None and not torch.isfinite(self.values).all():
            raise FormatError(f"{name}: the values hold NaN or infinity; download or make the checkpoint again")


@dataclass(frozen=True)
class Correction:
    """A small dense term beside a sparse weight: y += S (X x), `out` = S `[O, K]`, `pool` = X `[K, I]`.

    `pool` None means fixed sums of I / K consecutive inputs each (SLoRB's block of ones), which costs no memory.
    """

    out: Tensor
    pool: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of S and, where it is stored, X."""
        return self.out.nbytes + (0 if self.pool is None else self.pool.nbytes)

    @property
    def is_finite(self) -> bool:
        """Whether no number of it is NaN or infinite."""
        return all(bool(tensor.isfinite().all()) for tensor in (self.out, self.pool) if tensor is not None)

    def dense(self, in_features: int) -> Tensor:
        """S X as one float32 matrix `[O, I]`."""
        if self.pool is not None:
            return self.out.float() @ self.pool.float()
        return self.out.float().repeat_interleave(in_features // self.out.shape[1], dim=1)

    def to(self, dtype: torch.dtype) -> Correction:
        """The same correction on the CPU in the dtype it is stored in."""
        pool = None if self.pool is None else self.pool.detach().to("cpu", dtype)
        return Correction(self.out.detach().to("cpu", dtype), pool)


@dataclass(frozen=True)
class StoredLayer:
    """All a checkpoint stores of one target layer but its bias."""

    packed: PackedTensor
    correction: Correction | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.packed.nbytes + (0 if self.correction is None else self.correction.nbytes)

    @property
    def is_masked_only(self) -> bool:
        """Whether the layer is a float weight with zeros in it, and nothing else."""
        return self.correction is None and self.packed.scale is None

    def verify(self, name: str = "weight") -> None:
        """Raise `FormatError` unless the weight is sound (`PackedTensor.verify`) and the correction finite."""
        self.packed.verify(name)
        self._verify_correction(name)

    def verify_numbers(self, name: str = "weight") -> None:
        """The part of `verify` that reads numbers, not the mask."""
        self.packed.verify_numbers(name)
        self._verify_correction(name)

    def _verify_correction(self, name: str) -> None:
        if self.correction is not None and not self.correction.is_finite:
            raise FormatError(f"{name}: the correction holds NaN or infinity")

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The one weight `[O, I]` that computes the same: mask * W + S X, summed in float32, then rounded to `dtype`.

        Without a correction it is sparse, and values stored in `dtype` come out bit for bit.
        """
        weight_OI = self.packed.unpack()
        if self.correction is not None:
            weight_OI = weight_OI.float() + self.correction.dense(weight_OI.shape[1])
        return weight_OI.to(dtype)


def unpack(values: Tensor, bitmask: Tensor, scale: Tensor | None = None) -> Tensor:
    """Values `[O, I*n/m]`, bitmask `[O, I/8]` and scale `[O]`, or the same rows of all, to dense `[O, I]`. Of int4 as
    `PackedTensor` has them.

    +0 where pruned. In the values' dtype; with a scale, in float32. The bitmask must have as many bits set in each row
    as there are values (`check_bits`). `FormatError` on a CPU if it has more or fewer; a GPU is not waited for.
    """
    kept = values if scale is None else from_codes(values, scale)
    if bitmask.device.type == "cpu":
        return _unpack_on_cpu(kept, bitmask)
    mask_OI = unpack_bits(bitmask)
    return torch.zeros(mask_OI.shape, dtype=kept.dtype, device=kept.device).masked_scatter_(mask_OI, kept)


def _unpack_on_cpu(kept: Tensor, bitmask: Tensor) -> Tensor:
    """`unpack` by numpy, some rows at a time, so that the index of their set bits stays in the cache.

    torch's masked_scatter_ works in one thread too, but slower, and each operation before it starts and waits for all
    threads of the process; with several processes on one machine those waits take most of the time.
    """
    dense_OI = torch.zeros(bitmask.shape[0], bitmask.shape[1] * 8, dtype=kept.dtype, device="cpu")
    as_bits = _SAME_SIZE[kept.dtype.itemsize]  # numpy has no bfloat16, and numbers are only copied
    source, target = kept.detach().view(as_bits).numpy(), dense_OI.view(as_bits).numpy()
    step = max(1, _BYTES_AT_A_TIME // max(1, bitmask.shape[1]))
    for start in range(0, bitmask.shape[0], step):
        rows = slice(start, start + step)
        index = np.flatnonzero(unpack_bits(bitmask[rows]).numpy())
        kept_values = source[rows].reshape(-1)
        if index.size != kept_values.size:  # numpy would repeat a single value
            raise FormatError(
                f"from row {start} on, the bitmask keeps {index.size} weights, of which {kept_values.size} are stored; "
                "the file is damaged or was not written by maskgen"
            )
        target[rows].reshape(-1)[index] = kept_values
    return dense_OI


def check_shapes(
    values_shape: list[int], bitmask_shape: list[int], pattern: NMPattern, name: str, in_a_byte: int = 1
) -> None:
    """Check that stored shapes belong together, before any byte of the tensors is read.

    `in_a_byte` values share an element of the tensor of values.
    """
    if len(values_shape) != 2 or len(bitmask_shape) != 2 or min(*values_shape, *bitmask_shape) < 1:
        raise FormatError(f"{name}: values {values_shape} and bitmask {bitmask_shape}: expected two non-empty matrices")
    out_features, in_features = bitmask_shape[0], bitmask_shape[1] * 8
    kept = pattern.kept_columns(in_features)
    if in_features % pattern.m or [values_shape[0], values_shape[1] * in_a_byte] != [out_features, kept]:
        raise FormatError(
            f"{name}: values {values_shape} do not match bitmask {bitmask_shape} under pattern {pattern}: a weight "
            f"[{out_features}, {in_features}] keeps [{out_features}, {kept}]"
            + (f", {in_a_byte} in a byte" if in_a_byte > 1 else "")
        )
