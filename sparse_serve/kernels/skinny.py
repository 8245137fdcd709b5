# mypy: disable-error-code="name-defined, assignment, var-annotated"
# (the Gluon kernel is annotated with names of a module that is imported when it is first used)
"""The decode kernel for 2:4 weights on NVIDIA GPUs: few tokens, so time is the bytes of the weight, read once.

The sparse tensor core multiplies a 16 x 32 weight tile of which it is given only the kept half and, per group of four
columns, a column code: 4 bits for the two that are kept (`mma.sp`, PTX ISA, m16n8k32). Nothing is decompressed: the
weight goes from memory to registers to the tensor core, and what it costs is 0.5625 of a dense weight's bytes.

Values stored in 8 bits cost 0.3125. They are read as they are, expanded in registers to the activations' dtype, which
holds every one of them exactly, and multiplied by the same instruction. Their row's scale multiplies the finished sum,
in float32, so nothing is rounded but the sums and the result. int8 lies there as code + 128, see `_ptx`.

Layout. Rows are cut into strips of 16, columns into chunks of 256 = 8 tiles of 32; what does not fill them is padded
with zeros. A chunk of a strip is 1,152 words of 32 bits (with 8-bit values 640), contiguous, and every lane of a warp
reads its own words with 16-byte loads. First come the column codes, then the values:

    words    0 ..  127   word 4 * lane + q serves tiles 2q and 2q + 1, of which each uses half of the lanes
    words  128 .. 1151   word 128 + 128 * tile + 4 * lane + r is register r of the tile's A fragment, two values

Of 8-bit values one load is two tiles, 2u and 2u + 1. A word holds two registers, one in its even bytes and one in its
odd ones, because those are in different halves already, and there `_ptx` expands them:

    words  128 ..  639   byte b of word 128 + 128 * u + 4 * lane + 2 * v + k is of tile 2u + v, register 2k + b % 2: its
                         first value (b < 2) or its second

Lane 4g + t of a warp holds rows g (even r) and g + 8 (odd r). Activations stay as they are: lane 4g + t loads 8
neighbours of token g, columns 8t to 8t + 7 of a tile, two whole groups; the instruction wants of every group one half
from an even lane and the other from the odd one beside it. So neighbours swap halves (two shuffles), and the groups of
a tile come out in another order, which costs nothing because `prepare` orders the weight's groups in the same way.

Work. A program serves one or two strips and up to 32 tokens; its warps take the chunks in turn, and their sums are
added at the end in a fixed order, so results repeat bit for bit. What decides the speed is how many bytes are in
flight: a warp issues all loads of a chunk, 9 of 512 bytes (with 8-bit values 5), before its first product, and a fence
keeps the assembler from moving a load down to its use, which it does when left alone. More than 32 tokens run as passes
of 32 over the same weight, side by side, which only the L2 cache softens; other kernels are better there.

Legend: T = tokens, O = out features, I = in features, G = groups of four columns, S = strips, C = chunks, W = words;
in the Gluon kernel the dimensions are strips, tokens / 8, warps, lanes and a lane's 4 words.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskgen.core.packed import PackedTensor
from maskgen.core.values import CODE_DTYPES, FLOAT, FP8, INT8, kind_of
from sparse_serve.kernels import (
    LinearSpec,
    _ptx,
    capability_unsupported_reason,
    sparse_core_unsupported_reason,
    unsupported_values,
)

ROWS, COLUMNS = 16, 256
"""Rows of a strip, columns of a chunk."""

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
VALUES = (FLOAT, INT8, FP8)
"""Kinds of values it takes."""

_NO_CODE = 4
"""The column code of columns 0 and 1: what is not there must carry a legal one too."""

_ORDER = {2: (0, 3, 4, 5, 2, 8, 6, 7, 1, 9), 1: (0, 3, 4, 2, 8, 6, 5, 7, 9, 1)}
"""Of the dimensions named in `prepare`, by bytes of a value: strip, chunk, then what a lane loads, lane by lane."""


def unsupported_reason(spec: LinearSpec) -> str | None:
    """Only 2:4 in bfloat16 or float16 on an NVIDIA GPU with sparse tensor cores, where Triton has Gluon."""
    return (
        sparse_core_unsupported_reason(spec, _DTYPES)
        or unsupported_values(spec, *VALUES)
        or capability_unsupported_reason()
        or _problem()
    )


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """`blocks` int32 `[S, C, W]`, see above; `form` `[O, 0, I]`, which carries O, I and a dtype; of codes `scale`."""
    rows, columns = packed.shape
    strips, chunks = -(-rows // ROWS), -(-columns // COLUMNS)
    missing_rows, missing_groups = strips * ROWS - rows, (chunks * COLUMNS - columns) // 4
    size = packed.values.itemsize
    bits = packed.values.contiguous().view(torch.int8 if size == 1 else torch.int16)
    values = pad(bits, (0, 2 * missing_groups, 0, missing_rows))
    if packed.kind == INT8:
        values = values ^ _ptx.INT8_OFFSET
    codes_OG = pad(_codes(packed.bitmask), (0, missing_groups, 0, missing_rows), value=_NO_CODE)
    # Group 4p + 2j + i of a tile is the instruction's group 4j + 2i + p: where the swap of activations puts it.
    values = values.view(strips, 2, 8, chunks, 4, 2, 2, 2, 2, 2)  # strip, r % 2, g, chunk, u, v, p, j, i, which of two
    words = values.permute(_ORDER[size]).flatten(-2).contiguous().view(torch.int32)
    codes = codes_OG.view(strips, 2, 8, chunks, 4, 2, 2, 2, 2)  # strip, r % 2, g, chunk, q, tile % 2, p, j, i
    codes = codes.permute(0, 3, 2, 5, 7, 4, 1, 8, 6)  # strip, chunk, lane, q, then the bits of a word
    octets = (codes[..., 0] | codes[..., 1] << 4).flatten(-2)
    codes_SCW = octets.contiguous().view(torch.int32).reshape(strips, chunks, 128)
    tensors = {
        "blocks": torch.cat([codes_SCW, words.reshape(strips, chunks, -1)], dim=2),
        "form": packed.values.new_empty((rows, 0, columns)),
    }
    return tensors if packed.scale is None else {**tensors, "scale": packed.scale.contiguous()}


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]`."""
    y_TO: Tensor = skinny_linear(x_TI, tensors["blocks"], tensors["form"], tensors.get("scale"), bias_O)
    return y_TO


def split(tokens: int, strips: int, chunks: int) -> tuple[int, int]:
    """Strips and warps of a program: within 7 % of the fastest on an H200, summed over a Llama-3-8B block.

    Several strips share the activations, which come from the L2 cache and from 9 tokens on are as many bytes as the
    weights. Where strips are many, a program has four of them and a single warp, so nothing is summed over warps; where
    they are few, warps have to share a strip to fill the GPU, eight if it is long.
    """
    if strips >= 1024:
        return 4, 1
    wide = 1 if tokens <= 8 and chunks < 32 else 2
    return wide, 8 if chunks >= 32 and tokens <= 32 else 4


@torch.library.custom_op("sparse_serve::skinny_linear", mutates_args=())
def skinny_linear(
    x_TI: Tensor,
    blocks: Tensor,
    form: Tensor,
    scale_O: Tensor | None,
    bias_O: Tensor | None,
    wide: int = 0,
    warps: int = 0,
) -> Tensor:
    """The custom op behind `linear`. `wide` strips and `warps` per program; 0 leaves them to `split`.

    The first call with a new dtype, pass size or split compiles (seconds); make it before capturing a CUDA graph.
    """
    rows, columns = form.shape[0], form.shape[2]
    has_codes = form.dtype in CODE_DTYPES.values()
    dtypes = list(_DTYPES) if has_codes else [form.dtype]
    if x_TI.dtype not in dtypes or x_TI.shape[-1] != columns:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"x is {x_TI.dtype} {list(x_TI.shape)}, expected {expected} [..., {columns}]")
    if bias_O is not None and (bias_O.dtype != x_TI.dtype or bias_O.shape != (rows,) or not bias_O.is_contiguous()):
        raise ValueError(f"bias is {bias_O.dtype} {list(bias_O.shape)}, expected contiguous {x_TI.dtype} [{rows}]")
    if (scale_O is not None) != has_codes:
        raise ValueError(f"a scale belongs to 8-bit values and to no others, and values are {form.dtype}")
    if scale_O is not None and (
        scale_O.dtype != torch.float32 or scale_O.shape != (rows,) or not scale_O.is_contiguous()
    ):
        raise ValueError(f"scale is {scale_O.dtype} {list(scale_O.shape)}, expected contiguous float32 [{rows}]")
    y_TO = x_TI.new_empty((*x_TI.shape[:-1], rows))
    tokens = y_TO.numel() // rows
    if tokens == 0:
        return y_TO
    flat_TI = x_TI.reshape(tokens, columns).contiguous()
    if flat_TI.data_ptr() % 16:
        flat_TI = flat_TI.clone()  # a slice that starts inside one of the 16-byte words the kernel loads
    strips, chunks = blocks.shape[:2]
    best = split(tokens, strips, chunks)
    wide, warps = wide or best[0], warps or best[1]
    eights = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    grid = (-(-tokens // (8 * eights)), -(-strips // wide))
    scale, bias = y_TO if scale_O is None else scale_O, y_TO if bias_O is None else bias_O
    with torch.cuda.device_of(x_TI):
        _kernel()[grid](
            blocks, flat_TI.view(torch.int32), scale, bias, y_TO, tokens, rows, columns // 8, strips, chunks,
            **instructions(x_TI.dtype, form.dtype),
            WIDE=wide, EIGHTS=eights, WARPS=warps, BIAS=bias_O is not None, num_warps=warps,
        )  # fmt: skip
    return y_TO


@skinny_linear.register_fake
def _fake(
    x_TI: Tensor,
    blocks: Tensor,
    form: Tensor,
    scale_O: Tensor | None,
    bias_O: Tensor | None,
    wide: int = 0,
    warps: int = 0,
) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], form.shape[0]))


def instructions(dtype: torch.dtype, stored: torch.dtype) -> dict[str, Any]:
    """Constants of the Gluon kernel for activations of `dtype` and values stored as `stored`."""
    values = kind_of(stored)
    expand = _ptx.expansions(values, _DTYPES[dtype])
    loads = _ptx.TILES // (len(expand) or 1)
    return {"MULTIPLY": _ptx.multiplies(_DTYPES[dtype]), "EXPAND": expand, "LOADS": loads, "UNIT": _ptx.UNITS[values]}


def _codes(bitmask: Tensor) -> Tensor:
    """Bitmask `[O, I/8]` to codes uint8 `[O, G]`: first kept column | second << 2."""
    first = [next((bit for bit in range(4) if mask >> bit & 1), 0) for mask in range(16)]
    last = [max(mask.bit_length() - 1, 0) for mask in range(16)]
    table = torch.tensor([low | high << 2 for low, high in zip(first, last, strict=True)], dtype=torch.uint8)
    groups = torch.stack([bitmask & 15, bitmask >> 4], dim=-1).flatten(1)
    return table.to(bitmask.device)[groups.int()]


@cache
def _problem() -> str | None:
    """Why the kernel cannot be compiled here, or None."""
    try:
        _kernel()
    except (ImportError, AttributeError) as error:
        return f"this needs Triton 3.6 or later with its Gluon language: {error}"
    return None


@cache
def _kernel() -> Any:
    """The Gluon kernel. Defined on first use, because importing this file must not need Triton."""
    gluon = import_module("triton.experimental.gluon")
    gl = import_module("triton.experimental.gluon.language")
    swap, fence, words = gl.constexpr(_ptx.SWAP), gl.constexpr(_ptx.FENCE), gl.constexpr(_ptx.WORDS_OPERANDS)
    multiply_operands = gl.constexpr(_ptx.MULTIPLY_OPERANDS)

    @gluon.constexpr_function
    def along(layout, dimension):  # type: ignore[no-untyped-def]
        for other in (4, 3, 2, 1, 0):
            layout = layout if other == dimension else gl.SliceLayout(other, layout)
        return layout

    @gluon.jit(do_not_specialize=["tokens", "rows", "eighths", "strips", "chunks"])  # one binary for every shape
    def skinny(  # type: ignore[no-untyped-def]
        blocks, x, scale, bias, y, tokens, rows, eighths, strips, chunks, MULTIPLY: gl.constexpr, EXPAND: gl.constexpr,
        LOADS: gl.constexpr, UNIT: gl.constexpr, WIDE: gl.constexpr, EIGHTS: gl.constexpr, WARPS: gl.constexpr,
        BIAS: gl.constexpr,
    ):  # fmt: skip
        L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 4], [1, 1, 1, 32, 1], [1, 1, WARPS, 1, 1], [4, 3, 2, 1, 0])
        strip = gl.program_id(1) * WIDE + gl.arange(0, WIDE, layout=along(L, 0))[:, None, None, None, None]
        eight = gl.arange(0, EIGHTS, layout=along(L, 1))[None, :, None, None, None]
        warp = gl.arange(0, WARPS, layout=along(L, 2))[None, None, :, None, None]
        lane = gl.arange(0, 32, layout=along(L, 3))[None, None, None, :, None]
        word = gl.arange(0, 4, layout=along(L, 4))[None, None, None, None, :]
        first = gl.program_id(0) * (8 * EIGHTS)
        token = eight * 8 + lane // 4  # the one this lane loads
        x_at = x + first.to(gl.int64) * (4 * eighths) + (token * (4 * eighths) + lane % 4 * 4 + word)
        sums = gl.full([WIDE, EIGHTS, WARPS, 32, 4], 0.0, gl.float32, layout=L)
        for start in range(0, chunks, WARPS):
            chunk = start + warp
            ok = (strip < strips) & (chunk < chunks)
            at = blocks + ((strip * chunks + chunk) * (128 + 128 * LOADS) + lane * 4 + word)
            codes = gl.load(at, mask=ok, other=0x44444444, eviction_policy="evict_first")
            loaded = ()
            for part in gl.static_range(LOADS):
                loaded += (gl.load(at + (128 + 128 * part), mask=ok, other=0, eviction_policy="evict_first"),)
            codes = gl.inline_asm_elementwise(fence, words, [codes], dtype=gl.int32, is_pure=False, pack=4)
            eighth = chunk * 32 + lane % 4
            for tile in gl.static_range(8):
                a = loaded[tile * LOADS // 8]
                if LOADS < 8:
                    a = gl.inline_asm_elementwise(EXPAND[tile % 2], words, [a], dtype=gl.int32, is_pure=True, pack=4)
                x_ok = (token < tokens - first) & (eighth + 4 * tile < eighths)
                b = gl.load(x_at + (chunk * 128 + 16 * tile), mask=x_ok, other=0)
                b = gl.inline_asm_elementwise(swap, words, [b], dtype=gl.int32, is_pure=True, pack=4)
                args = [a, b, codes, sums]
                sums = gl.inline_asm_elementwise(MULTIPLY[tile], multiply_operands, args, gl.float32, True, 4)
        total = gl.sum(sums, 2, keep_dims=True)
        row = strip * 16 + lane // 4 + word // 2 * 8
        token = eight * 8 + lane % 4 * 2 + word % 2  # the one this lane has summed
        if LOADS < 8:
            total = total * UNIT * gl.load(scale + row, mask=row < rows, other=0)
        if BIAS:
            total += gl.load(bias + row, mask=row < rows, other=0).to(gl.float32)
        y_at = y + first.to(gl.int64) * rows + (token * rows + row)
        gl.store(y_at, total.to(y.dtype.element_ty), mask=(row < rows) & (token < tokens - first))

    return skinny
