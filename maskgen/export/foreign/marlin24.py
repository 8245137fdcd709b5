"""`marlin-24` of compressed-tensors: 2:4 weights of 4 or 8 bits as Sparse-Marlin's GPU kernel reads them. No release of
that library could read them back. For a weight `[O, I]` of the module T, with b bits:

    T.weight_packed   int32 [I/32, O*b/2]     the kept codes, 32/b to a word, lowest bits first, in tiles (below)
    T.meta            int16 [I/32, 2*O]       where they belong: 4 bits for each group of four columns
    T.scale_packed    float16 [G, O]          G = 1: a scale for each row; G = I/128: one for 128 inputs of it

Codes are stored plus 2^(b-1). They form a matrix of I/2 rows (the kept values of a row of the weight, in order) by O
columns, cut into tiles of 16 by 16; the tiles of 16 rows lie next to each other, and four of them at a time are one
block of 1024 codes, in the order in which the 32 threads of a warp load them.

`meta` is the matrix of metadata in an order like CUTLASS's, but with the rows of 64 in an order of its own. A word of
16 bits is four groups of a row, lowest bits first; the two low bits of a group are the column of its first kept value,
the two high bits that of its second.

Sources: `compressors/sparse_quantized_compressors/marlin_24.py` and `utils/semi_structured_conversions.py` of
https://github.com/neuralmagic/compressed-tensors, and https://github.com/IST-DASLab/Sparse-Marlin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from maskgen.core.errors import FormatError, clip
from maskgen.core.packed import PackedTensor
from maskgen.export.foreign import TWO_FOUR, ForeignLayer, Source

PACKED, META, SCALES = ".weight_packed", ".meta", ".scale_packed"
GROUP = 128
"""Inputs that share a scale, where not the whole row does."""

_TILE = 16
_BLOCK = 4 * _TILE * _TILE
_ROWS = 64
"""Metadata is reordered within this many rows."""

_COLUMNS_OF = {4: (0, 1), 8: (0, 2), 9: (1, 2), 12: (0, 3), 13: (1, 3), 14: (2, 3)}
"""The two columns that the 4 bits of a group name; other bits name none."""


@dataclass(frozen=True)
class Marlin24(ForeignLayer):
    """A weight in Sparse-Marlin's layout, of `bits` bits, with `groups` scales in each row."""

    FOUND: ClassVar[str] = "marlin-24"
    BECOMES_FLOATS: ClassVar[bool] = True

    bits: int
    groups: int

    @classmethod
    def of(cls, source: Source, name: str) -> Marlin24:
        """The layer of a module with a tensor `weight_packed`. Raises `FormatError` for shapes that do not fit."""
        packed, meta, scales = (source.header(name + suffix) for suffix in (PACKED, META, SCALES))
        where = f"{source.path}: {name}"
        if (packed.dtype, meta.dtype) != ("I32", "I16") or scales.dtype not in ("F16", "BF16", "F32"):
            raise FormatError(
                f"{where}: weight_packed {packed.dtype}, meta {meta.dtype}, scale_packed {scales.dtype}; expected I32, "
                "I16 and F16"
            )
        shapes = [list(header.shape) for header in (packed, meta, scales)]
        if any(len(shape) != 2 for shape in shapes) or meta.shape[1] % (2 * _ROWS) or packed.shape[0] != meta.shape[0]:
            raise FormatError(f"{where}: weight_packed, meta and scale_packed {shapes} are of no weight in this layout")
        rows, columns = meta.shape[1] // 2, 32 * meta.shape[0]
        bits = {2 * rows: 4, 4 * rows: 8}.get(packed.shape[1])
        whole = [1, columns // GROUP] if columns % GROUP == 0 else [1]
        if bits is None or scales.shape[1] != rows or scales.shape[0] not in whole:
            raise FormatError(
                f"{where}: weight_packed {shapes[0]} and scale_packed {shapes[2]} do not fit meta {shapes[1]}: a "
                f"weight [{rows}, {columns}] has {2 * rows} or {4 * rows} columns of words, and {whole} rows of {rows} "
                "scales"
            )
        return cls(source, name, (rows, columns), bits, scales.shape[0])

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `ForeignLayer.tensors`."""
        return self.stored(PACKED, META, SCALES)

    def packed(self) -> PackedTensor:
        """See `ForeignLayer.packed`. With a scale for each row the codes stay what they are; with one for 128 inputs
        they become floats."""
        bitmask, codes_OV, scale_OG = self._bitmask(), self._codes(), self._scales()
        if self.groups == 1:
            packed = PackedTensor(codes_OV, bitmask, TWO_FOUR, scale_OG.reshape(-1).contiguous())
        else:
            values_OV = codes_OV.float() * scale_OG.repeat_interleave(GROUP // 2, dim=1)
            packed = PackedTensor(values_OV.to(self.source.dtype), bitmask, TWO_FOUR)
        packed.verify(f"{self.source.path}: {self.name}")
        return packed

    def dense(self) -> Tensor:
        """See `ForeignLayer.dense`."""
        return self.floats(self.packed())

    def _bitmask(self) -> Tensor:
        rows, columns = self.shape
        meta = self.source.tensor(self.name + META).reshape(-1)
        in_order = meta[_meta_places(rows, columns // 16)].contiguous().view(torch.uint8)  # a byte is two groups
        table, legal = _bits_of_codes()
        bad = ~legal[in_order.int()]
        if bad.any():
            row, byte = bad.nonzero()[0].tolist()
            raise self.refuse(
                f"meta: row {row}, columns {8 * byte}..{8 * byte + 7} have the code {clip(int(in_order[row, byte]))}, "
                "which does not name two ascending columns of each group"
            )
        return table[in_order.int()]

    def _codes(self) -> Tensor:
        """Signed codes int8 `[O, V]`."""
        rows, columns = self.shape
        words = self.source.tensor(self.name + PACKED)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        unsigned = (words[:, :, None] >> shifts) & ((1 << self.bits) - 1)
        in_order = torch.empty_like(unsigned.reshape(-1, _BLOCK))
        in_order[:, _block_places(self.bits)] = unsigned.reshape(-1, _BLOCK)
        tiles = in_order.reshape(columns // 2 // _TILE, rows // _TILE, _TILE, _TILE)
        codes_VO = tiles.transpose(1, 2).reshape(columns // 2, rows)
        return (codes_VO - (1 << (self.bits - 1))).to(torch.int8).t().contiguous()

    def _scales(self) -> Tensor:
        """Scales float32 `[O, G]`, finite and above 0."""
        stored_GO = self.source.tensor(self.name + SCALES).float()
        bad = ~(stored_GO.isfinite() & (stored_GO > 0))
        if bad.any():
            group, place = bad.nonzero()[0].tolist()
            raise self.refuse(f"scale_packed [{group}, {place}] is {stored_GO[group, place].item()}, expected above 0")
        if self.groups == 1 or self.shape[1] // 2 <= GROUP:  # the writer compares its group with the number of kept
            return stored_GO.t()
        scale_GO = torch.empty_like(stored_GO).reshape(-1, 8)
        scale_GO[:, [0, 4, 1, 5, 2, 6, 3, 7]] = stored_GO.reshape(-1, 8)
        return scale_GO.reshape(stored_GO.shape).t()


def _meta_places(rows: int, words: int) -> Tensor:
    """Where the word of metadata [row, word] lies in the stored tensor, `[rows, words]`.

    Rows are reordered within 64 of them, blocks of 2 by 2 words transposed, and pairs of columns stored one after the
    other, all rows of each.
    """
    row, word = torch.arange(rows)[:, None], torch.arange(words)[None, :]
    moved = row // _ROWS * _ROWS + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % _ROWS // 8 * 4
    pair, right, lower = word // 2, word % 2, moved % 2
    return pair * 2 * rows + (moved - lower + right) * 2 + lower


@cache
def _block_places(bits: int) -> Tensor:
    """Where each of the 1024 stored codes of a block belongs in its four tiles, tile by tile and row by row."""
    at = torch.arange(_BLOCK)
    thread, column, half, which = at // 32, at // 8 % 4, at // 4 % 2, at % 4
    tile, row = thread // 8, thread % 4 * 2 + which % 2 + which // 2 * 8
    place = tile * _TILE * _TILE + row * _TILE + thread // 4 % 2 * 8 + half * 4 + column
    per_word = 32 // bits
    evens_first = torch.cat([torch.arange(0, per_word, 2), torch.arange(1, per_word, 2)])
    return place.reshape(-1, per_word)[:, evens_first].reshape(-1)


@cache
def _bits_of_codes() -> tuple[Tensor, Tensor]:
    """For each byte of metadata, two groups: the byte of a bitmask, and whether the byte is legal."""
    table, legal = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.bool)
    for low, (a, b) in _COLUMNS_OF.items():
        for high, (c, d) in _COLUMNS_OF.items():
            table[high << 4 | low] = 1 << a | 1 << b | 1 << 4 + c | 1 << 4 + d
            legal[high << 4 | low] = True
    return table, legal
