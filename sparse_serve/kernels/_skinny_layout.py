"""How `skinny` keeps a 2:4 weight in memory: in the order in which the lanes of a warp and the sparse tensor core want
it, so that every load is 16 contiguous bytes of a lane.

Rows are cut into strips of 16, columns into chunks of 256 = 8 tiles of 32; what does not fill them is padded with
zeros. A chunk of a strip is contiguous. Its words of 32 bits, and its bytes where dense bfloat16 is 1:

    values                              column codes    values    scales    bytes
    16-bit                                       128     1,024         0    0.5625
    8-bit                                        128       512         0    0.3125
    int4, a scale for each row                   128       256         0    0.1875
    int4, for each 128 kept values               128       256        16    0.1953
    int4, for each 64 kept values                128       256        32    0.2031

    column codes    word 4 * lane + q serves tiles 2q and 2q + 1, of which each uses half of the lanes
    16-bit values   word 128 * tile + 4 * lane + r is register r of the tile's A fragment, two values

Of 8-bit values one load is two tiles, 2u and 2u + 1. A word holds two registers, one in its even bytes and one in its
odd ones, because those are in different halves already, and there `_ptx` expands them:

    8-bit values    byte b of word 128 * u + 4 * lane + 2 * v + k is of tile 2u + v, register 2k + b % 2: its first
                    value (b < 2) or its second

Of int4 values one load is four tiles, 4u to 4u + 3, and a word holds all four registers of one:

    int4 values     bits 4r to 4r + 3 of word 128 * u + 4 * lane + v are of tile 4u + v, register r: its first value;
                    bits 16 + 4r to 19 + 4r its second

Two kept values stand for four columns, so the 128 kept values of a row in a chunk are n = 1 or n = 2 whole groups, and
a chunk brings their scales, float32 as they are stored, with the two that a lane wants side by side. A scale for each
row, of 8-bit values too, is in a vector of its own.

    scales          word 2n * g + 2h + i is of row g + 8i, group h of the chunk

Lane 4g + t of a warp holds rows g (even r) and g + 8 (odd r). Of activations lane 4g + t loads 8 neighbours of token g,
columns 8t to 8t + 7 of a tile, two whole groups of four; the instruction wants of every such group one half from an
even lane and the other from the odd one beside it. So neighbours swap halves (two shuffles), and the groups of a tile
come out in another order, which costs nothing because the weight's groups are ordered in the same way here.

Legend: O = out features, I = in features, V = kept values per row, G = groups of four columns, S = strips, C = chunks,
W = words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskgen.core.int4 import pack_nibbles, unpack_nibbles
from maskgen.core.packed import PackedTensor
from maskgen.core.values import INT4
from sparse_serve.kernels import _ptx

ROWS, COLUMNS = 16, 256
"""Rows of a strip, columns of a chunk."""

GROUPS = (64, 128, None)
"""Kept values that share a scale, of which a chunk, with 128 of a row, has whole groups; None: those of a row."""

LOAD = 128
"""Words of one load by a warp: 16 bytes a lane."""

_NO_CODE = 4
"""The column code of columns 0 and 1: what is not there must carry a legal one too."""

_ORDER = {
    16: (0, 3, 4, 5, 6, 2, 9, 7, 8, 1, 10),
    8: (0, 3, 4, 5, 2, 9, 7, 6, 8, 10, 1),
    4: (0, 3, 4, 2, 9, 7, 5, 6, 10, 8, 1),
}
"""Of the dimensions named in `_values`, by bits of a value: strip, chunk, then what a lane loads, lane by lane."""


def unsupported_group(group: int | None) -> str | None:
    """Why a weight with a scale for each `group` kept values has no such layout."""
    return None if group in GROUPS else f"{group} values share a scale; expected 64, 128 or those of a row"


def blocks_of(packed: PackedTensor) -> Tensor:
    """The chunks of every strip, int32 `[S, C, W]`."""
    rows, columns = packed.shape
    strips, chunks = -(-rows // ROWS), -(-columns // COLUMNS)
    missing_rows, missing_groups = strips * ROWS - rows, (chunks * COLUMNS - columns) // 4
    parts_SCW = [
        _column_codes(pad(_codes(packed.bitmask), (0, missing_groups, 0, missing_rows), value=_NO_CODE)),
        _values(packed, (0, 2 * missing_groups, 0, missing_rows)),
    ]
    if packed.scale is not None and packed.group is not None:
        scales = COLUMNS // 2 // packed.group
        padding = (0, chunks * scales - packed.scale.shape[1], 0, missing_rows)
        scale = pad(packed.scale, padding).view(strips, 2, 8, chunks, scales)  # strip, i, g, chunk, h
        parts_SCW.append(scale.permute(0, 3, 2, 4, 1).contiguous().view(torch.int32))
    return torch.cat([part.reshape(strips, chunks, -1) for part in parts_SCW], dim=2)


def scales_of(blocks: Tensor, loads: int) -> int:
    """n: how many scales a row has in each chunk of `[S, C, W]`, whose values are `loads` loads."""
    return (blocks.shape[2] - LOAD * (1 + loads)) // ROWS


def _values(packed: PackedTensor, padding: tuple[int, ...]) -> Tensor:
    """The values of every chunk, in int32 words, strip by strip."""
    size = packed.values.itemsize
    bits = 4 if packed.kind == INT4 else 8 * size
    whole = unpack_nibbles(packed.values) if bits == 4 else packed.values.view(torch.int8 if size == 1 else torch.int16)
    values = pad(whole.contiguous(), padding)
    if packed.kind in _ptx.OFFSETS:
        values = values ^ _ptx.OFFSETS[packed.kind]
    # Group 4p + 2j + i of a tile is the instruction's group 4j + 2i + p: where the swap of activations puts it.
    # strip, r % 2, g, chunk, tile // 4, tile // 2 % 2, tile % 2, p, j, i, which of two
    values = values.view(-1, 2, 8, values.shape[1] * 2 // COLUMNS, *[2] * 7)
    values = values.permute(_ORDER[bits]).flatten(-3).contiguous()
    if bits == 4:
        values = pack_nibbles(values.view(-1, 8))
    return values.view(torch.int32)


def _column_codes(codes_OG: Tensor) -> Tensor:
    """Column codes uint8 of whole chunks to int32 words, strip by strip."""
    codes = codes_OG.view(-1, 2, 8, codes_OG.shape[1] * 4 // COLUMNS, 4, 2, 2, 2, 2)  # strip, r % 2, g, chunk, q,
    codes = codes.permute(0, 3, 2, 5, 7, 4, 1, 8, 6)  # tile % 2, p, j, i -> strip, chunk, lane, q, the bits of a word
    octets = (codes[..., 0] | codes[..., 1] << 4).flatten(-2)
    return octets.contiguous().view(torch.int32)


def _codes(bitmask: Tensor) -> Tensor:
    """Bitmask `[O, I/8]` to codes uint8 `[O, G]`: first kept column | second << 2."""
    first = [next((bit for bit in range(4) if mask >> bit & 1), 0) for mask in range(16)]
    last = [max(mask.bit_length() - 1, 0) for mask in range(16)]
    table = torch.tensor([low | high << 2 for low, high in zip(first, last, strict=True)], dtype=torch.uint8)
    groups = torch.stack([bitmask & 15, bitmask >> 4], dim=-1).flatten(1)
    return table.to(bitmask.device)[groups.int()]
