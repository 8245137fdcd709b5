"""How kept values are stored: as floats, as 8-bit codes with one float32 scale for each row, or as 4-bit codes.

    int8        code = round(w / scale),        scale = max|w| / 127      codes -127 .. 127
    fp8_e4m3    code = nearest e4m3 of w/scale, scale = max|w| / 448      448 is the largest e4m3; NaN is never written
    int4        two codes a byte, a scale for each group of values        see `int4`

Symmetric, so that zero is exactly zero, and the maximum is over the row's *kept* weights only: pruned ones are not
stored, so no zero point could disturb them and none of the range is spent on them. -128 is read, because other tools
write it, and checkpoints of theirs are converted code by code. The weight a code stands for is
`float32(code) * scale`, a product of two float32 that every reader rounds alike.

Legend: O = out features, V = kept values per row, S = scales per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskgen.core import int4
from maskgen.core.errors import FormatError

FLOAT, INT8, FP8, INT4 = "float", "int8", "fp8_e4m3", "int4"
KINDS = (FLOAT, INT8, FP8, INT4)

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODE_DTYPES = {INT8: torch.int8, FP8: torch.float8_e4m3fn, INT4: torch.uint8}
LARGEST = {INT8: 127.0, FP8: 448.0, INT4: 8.0}
"""Largest magnitude of a code that a scale must be finite with."""


def kind_of(dtype: torch.dtype, name: str = "weight") -> str:
    """The kind of values a dtype stores; `FormatError` naming the tensor if it stores none."""
    for kind, code_dtype in CODE_DTYPES.items():
        if dtype == code_dtype:
            return kind
    if dtype not in FLOAT_DTYPES:
        raise FormatError(f"{name}: values {dtype}, expected one of {[*FLOAT_DTYPES, *CODE_DTYPES.values()]}")
    return FLOAT


def per_byte(kind: str) -> int:
    """How many values share an element of the stored tensor."""
    return int4.PER_BYTE if kind == INT4 else 1


def nbytes_of(kind: str, rows: int, kept: int, itemsize: int, group: int | None = None) -> int:
    """Bytes of `kept` values in each of `rows`, and of their scales; `itemsize` is that of a float value."""
    if kind == FLOAT:
        return rows * kept * itemsize
    scales = math.prod(int4.scale_shape(rows, kept, group)) if kind == INT4 else rows
    return rows * kept // per_byte(kind) + scales * torch.float32.itemsize


def to_codes(values_OV: Tensor, kind: str, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes `[O, V]` of `kind` and their scales float32 `[O]`. A row of zeros gets scale 1.

    Of int4, octets `[O, V/2]`, and with a `group` scales `[O, S]`.
    """
    if kind == INT4:
        return int4.to_int4(values_OV, group)
    exact_OV = values_OV.float()
    largest_O = exact_OV.abs().amax(1)
    # A scale below the normal numbers would lose its own digits; one rounded up at the very top, make infinity.
    limits = torch.finfo(torch.float32)
    top = torch.tensor(limits.max, device="cpu") / LARGEST[kind]
    most = torch.nextafter(top, torch.zeros_like(top)).item()
    scale_O = (largest_O / LARGEST[kind]).clamp(limits.tiny, most)
    scale_O = torch.where(largest_O == 0, torch.ones_like(scale_O), scale_O)
    steps_OV = (exact_OV / scale_O[:, None]).clamp(-LARGEST[kind], LARGEST[kind])
    if kind == INT8:
        steps_OV = steps_OV.round()
    return steps_OV.to(CODE_DTYPES[kind]), scale_O


def from_codes(codes_OV: Tensor, scale: Tensor) -> Tensor:
    """The float32 values `[O, V]` that codes `[O, V]` with scales `[O]`, or of int4 octets `[O, V/2]`, stand for."""
    if codes_OV.dtype == CODE_DTYPES[INT4]:
        exact_OV = int4.unpack_nibbles(codes_OV).float()
        return exact_OV * int4.spread(scale, exact_OV.shape[1])
    return codes_OV.float() * scale[:, None]


def check_scale(scale: Tensor | None, values: Tensor, name: str) -> None:
    """Raise `FormatError` unless a scale is there exactly when `values` are codes: one number > 0 a row, or of int4 for
    each group of a row.

    It must be finite even times the largest code, so that no weight is infinite.
    """
    kind = kind_of(values.dtype, name)
    if (scale is None) != (kind == FLOAT):
        raise FormatError(f"{name}: values {values.dtype} {'without' if scale is None else 'with'} a scale")
    if scale is None:
        return
    shape = [values.shape[0]]
    if kind == INT4:
        kept = values.shape[1] * int4.PER_BYTE
        shape = int4.scale_shape(values.shape[0], kept, int4.group_of(kept, list(scale.shape), name))
    if scale.dtype != torch.float32 or list(scale.shape) != shape:
        raise FormatError(f"{name}: scale {scale.dtype} {list(scale.shape)}, expected float32 {shape}")
    bad = ~(torch.isfinite(scale * LARGEST[kind]) & (scale > 0))
    if kind == INT8:
        bad |= ~torch.isfinite(scale * -128) & (values == -128).any(1)
    if bad.any():
        row, *group = bad.nonzero()[0].tolist()
        where = f"row {row}" + "".join(f", group {number}" for number in group)
        raise FormatError(
            f"{name}: scale of {where} is {scale[row, *group].item()}, expected above 0 and finite times "
            f"{LARGEST[kind]:.0f}"
        )


def check_codes(values: Tensor, name: str) -> None:
    """Raise `FormatError` if `values` hold a code that is no number: NaN in float8."""
    if values.dtype != torch.float8_e4m3fn:
        return
    bad = (values.view(torch.uint8) & 0x7F) == 0x7F
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise FormatError(f"{name}: values: code {column} of row {row} is NaN")
