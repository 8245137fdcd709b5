"""`sparse-24-bitmask` of compressed-tensors (until release 0.12): for a weight `[O, I]` of the module T

    T.compressed    [O, I/2]         the two kept values of each group of four, in column order: floats, int8 or fp8
    T.bitmask       uint8 [O, I/8]   bit j of byte k is column 8k + j
    T.shape         int64 [2, 1]     O, I
    T.weight_scale                   with codes: [O, 1] or [1], floats

Every group has exactly two bits set, whatever the values are. Source: `compressors/sparse_compressors/` of
https://github.com/neuralmagic/compressed-tensors.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from maskgen.core.errors import FormatError
from maskgen.core.layout import TensorHeader
from maskgen.core.packed import PackedTensor, check_shapes
from maskgen.export.foreign import FLOATS, QUANTISED, SCALE, TWO_FOUR, ForeignLayer, Source
from maskgen.export.foreign.masked import CODES

COMPRESSED, BITMASK, SHAPE = ".compressed", ".bitmask", ".shape"


class Bitmask(ForeignLayer):
    """A weight as values and bitmask."""

    FOUND: ClassVar[str] = "sparse-24-bitmask"

    @classmethod
    def of(cls, source: Source, name: str) -> Bitmask:
        """The layer of a module that has a tensor `compressed`. Raises `FormatError` for shapes that do not fit."""
        values, bitmask, shape = (source.header(name + suffix) for suffix in (COMPRESSED, BITMASK, SHAPE))
        where = f"{source.path}: {name}"
        _check_dtypes(where, values, bitmask, shape)
        check_shapes(list(values.shape), list(bitmask.shape), TWO_FOUR, where)
        rows, columns = bitmask.shape[0], bitmask.shape[1] * 8
        claimed = source.tensor(name + SHAPE).reshape(-1).tolist()
        if claimed != [rows, columns]:
            raise FormatError(f"{where}: shape says {claimed}, but values and bitmask are of [{rows}, {columns}]")
        if (values.dtype in CODES) != (name + SCALE in source.headers):
            raise FormatError(
                f"{where}: compressed {values.dtype} {'without' if values.dtype in CODES else 'with'} a weight_scale"
            )
        return cls(source, name, (rows, columns))

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `ForeignLayer.tensors`."""
        return self.stored(COMPRESSED, BITMASK, SHAPE, *QUANTISED)

    def packed(self) -> PackedTensor:
        """See `ForeignLayer.packed`."""
        values, bitmask = (self.source.tensor(self.name + suffix) for suffix in (COMPRESSED, BITMASK))
        scale = self.row_scale() if self.source.headers[self.name + COMPRESSED].dtype in CODES else None
        packed = PackedTensor(values, bitmask, TWO_FOUR, scale)
        packed.verify(f"{self.source.path}: {self.name}")
        return packed

    def dense(self) -> Tensor:
        """See `ForeignLayer.dense`."""
        return self.floats(self.packed())


def _check_dtypes(where: str, values: TensorHeader, bitmask: TensorHeader, shape: TensorHeader) -> None:
    if values.dtype not in (*FLOATS, *CODES) or bitmask.dtype != "U8":
        raise FormatError(
            f"{where}: compressed {values.dtype}, bitmask {bitmask.dtype}; expected one of {[*FLOATS, *CODES]} and U8"
        )
    if shape.dtype != "I64" or list(shape.shape) not in ([2], [2, 1]):
        raise FormatError(f"{where}: shape is {shape.dtype} {list(shape.shape)}, expected I64 [2, 1]")
