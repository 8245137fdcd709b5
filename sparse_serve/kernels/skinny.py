# mypy: disable-error-code="name-defined, assignment"
# (the Gluon kernel is annotated with names of a module that is imported when it is first used)
"""The decode kernel for 2:4 weights on NVIDIA GPUs: few tokens, so time is the bytes of the weight, read once.

The sparse tensor core multiplies a 16 x 32 weight tile of which it is given only the kept half and, per group of four
columns, a 4-bit code of the two columns kept (`mma.sp`, PTX ISA, m16n8k32). Nothing is decompressed: the weight goes
from memory to registers to the tensor core, and what it costs is 0.5625 of a dense weight's bytes.

Layout. Rows are cut into strips of 16, columns into chunks of 256 = 8 tiles of 32; what does not fill them is padded
with zeros. A chunk of a strip is 1,152 words of 32 bits, contiguous, and every lane of a warp reads its own words with
16-byte loads:

    words    0 ..  127   codes:  word 4 * lane + q serves tiles 2q and 2q + 1, of which each uses half of the lanes
    words  128 .. 1151   values: word 128 + 128 * tile + 4 * lane + r is register r of the tile's A fragment, two values

Lane 4g + t of a warp holds rows g (even r) and g + 8 (odd r). Activations stay as they are: lane 4g + t loads 8
neighbours of token g, columns 8t to 8t + 7 of a tile, two whole groups; the instruction wants of every group one half
from an even lane and the other from the odd one beside it. So neighbours swap halves (two shuffles), and the groups of
a tile come out in another order, which costs nothing because `prepare` orders the weight's groups in the same way.

Work. A program serves one or two strips and up to 32 tokens; its warps take the chunks in turn, and their sums are
added at the end in a fixed order, so results repeat bit for bit. What decides the speed is how many bytes are in
flight: a warp issues all 9 loads of a chunk, 4.6 kB, before its first product, and a fence keeps the assembler from
moving a load down to its use, which it does when left alone. More than 32 tokens run as passes of 32 over the same
weight, side by side, which only the L2 cache softens; other kernels are better there.

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
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT
from sparse_serve.kernels import LinearSpec

ROWS, COLUMNS = 16, 256
"""Rows of a strip, columns of a chunk."""
CAPABILITY = (8, 0)
"""The first GPUs with sparse tensor cores."""

_PATTERN = NMPattern(2, 4)
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_NO_CODE = 4
"""The code of columns 0 and 1: what is not there must carry a legal one too."""

MULTIPLY = (
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$16,$17,$18,$19}}, ${code}, 0x{half};"
)
"""Operands in this order: 4 sums out, 4 of A, 4 of B, 4 words of codes of which one is used, 4 sums in."""
MULTIPLY_OPERANDS = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f"

SWAP = """{
.reg .pred odd; .reg .b32 lane, first, second;
mov.u32 lane, %laneid;
and.b32 lane, lane, 1;
setp.ne.b32 odd, lane, 0;
selp.b32 first, $4, $5, odd;
selp.b32 second, $6, $7, odd;
shfl.sync.bfly.b32 first, first, 1, 0x1f, 0xffffffff;
shfl.sync.bfly.b32 second, second, 1, 0x1f, 0xffffffff;
selp.b32 $0, first, $4, odd;
selp.b32 $1, second, $6, odd;
selp.b32 $2, $5, first, odd;
selp.b32 $3, $7, second, odd;
}"""
"""8 neighbours of a token in 4 registers, to the B fragment: even lanes end with first halves, odd with second."""
SWAP_OPERANDS = "=&r,=&r,=&r,=&r,r,r,r,r"

FENCE = "bar.warp.sync 0xffffffff; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;"
"""Loads before it stay before it; products come after it, because they take their codes from it."""
FENCE_OPERANDS = "=&r,=&r,=&r,=&r,r,r,r,r"


def refuse(spec: LinearSpec) -> str | None:
    """Only 2:4 in bfloat16 or float16 on an NVIDIA GPU with sparse tensor cores, where Triton has Gluon."""
    if spec.device_type != "cuda" or torch.version.hip is not None:
        return f"device {spec.device_type} is not an NVIDIA GPU"
    if spec.pattern != _PATTERN:
        return f"pattern {spec.pattern} is not 2:4"
    if spec.dtype not in _DTYPES:
        return f"dtype {spec.dtype} is not one of {list(_DTYPES)}"
    if spec.values != FLOAT:
        return f"values {spec.values} are not {FLOAT}: activations would have to be rounded to 8 bits"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return f"compute capability {capability} is below {CAPABILITY}: no sparse tensor cores"
    return _problem()


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """`blocks` int32 `[S, C, W]`, see above; and `form` `[O, 0, I]`, which carries O, I and the dtype."""
    rows, columns = packed.shape
    strips, chunks = -(-rows // ROWS), -(-columns // COLUMNS)
    padding = (0, (chunks * COLUMNS - columns) // 4, 0, strips * ROWS - rows)
    pairs_OG = pad(packed.values.contiguous().view(torch.int32), padding)
    codes_OG = pad(_codes(packed.bitmask), padding, value=_NO_CODE)
    # Group 4p + 2j + i of a tile is the instruction's group 4j + 2i + p: where the swap of activations puts it.
    pairs = pairs_OG.view(strips, 2, 8, chunks, 8, 2, 2, 2)  # strip, r % 2, g, chunk, tile, p, j, i
    values_SCW = pairs.permute(0, 3, 4, 2, 7, 5, 6, 1).reshape(strips, chunks, 8 * 128)
    codes = codes_OG.view(strips, 2, 8, chunks, 4, 2, 2, 2, 2)  # strip, r % 2, g, chunk, q, tile % 2, p, j, i
    codes = codes.permute(0, 3, 2, 5, 7, 4, 1, 8, 6)  # strip, chunk, lane, q, then the bits of a word
    octets = (codes[..., 0] | codes[..., 1] << 4).flatten(-2)
    codes_SCW = octets.contiguous().view(torch.int32).reshape(strips, chunks, 128)
    return {
        "blocks": torch.cat([codes_SCW, values_SCW], dim=2),
        "form": packed.values.new_empty((rows, 0, columns)),
    }


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]`."""
    y_TO: Tensor = skinny_linear(x_TI, tensors["blocks"], tensors["form"], bias_O)
    return y_TO


def split(tokens: int, strips: int, chunks: int) -> tuple[int, int]:
    """Strips and warps of a program.

    From 9 tokens on, activations are as many bytes as weights, so two strips share them. Where programs are few for
    the GPU, each gets 16 warps; else 8, of which more programs run beside one another, and a program of two strips and
    32 tokens never gets more, for want of registers. No more warps than chunks.
    """
    wide = 1 if tokens <= 8 else 2
    most = 16 if strips < 512 * wide and tokens <= 16 else 8
    return wide, next(warps for warps in (4, 8, 16) if warps >= min(chunks, most))


@torch.library.custom_op("sparse_serve::skinny_linear", mutates_args=())
def skinny_linear(
    x_TI: Tensor, blocks: Tensor, form: Tensor, bias_O: Tensor | None, wide: int = 0, warps: int = 0
) -> Tensor:
    """The custom op behind `linear`. `wide` strips and `warps` per program; 0 leaves them to `split`.

    The first call with a new dtype, pass size or split compiles (seconds); make it before capturing a CUDA graph.
    """
    rows, columns = form.shape[0], form.shape[2]
    if x_TI.dtype != form.dtype or x_TI.shape[-1] != columns:
        raise ValueError(f"x is {x_TI.dtype} {list(x_TI.shape)}, expected {form.dtype} [..., {columns}]")
    if bias_O is not None and (bias_O.dtype != form.dtype or bias_O.shape != (rows,) or not bias_O.is_contiguous()):
        raise ValueError(f"bias is {bias_O.dtype} {list(bias_O.shape)}, expected contiguous {form.dtype} [{rows}]")
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
    with torch.cuda.device_of(x_TI):
        _kernel()[grid](
            blocks, flat_TI.view(torch.int32), y_TO if bias_O is None else bias_O, y_TO,
            tokens, rows, columns // 8, strips, chunks,
            MULTIPLY=_multiplies(x_TI.dtype), WIDE=wide, EIGHTS=eights, WARPS=warps, BIAS=bias_O is not None,
            num_warps=warps,
        )  # fmt: skip
    return y_TO


@skinny_linear.register_fake
def _fake(x_TI: Tensor, blocks: Tensor, form: Tensor, bias_O: Tensor | None, wide: int = 0, warps: int = 0) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], form.shape[0]))


def _multiplies(dtype: torch.dtype) -> tuple[str, ...]:
    """The instruction for each of the 8 tiles of a chunk: which word of codes, and from which lanes."""
    return tuple(MULTIPLY.format(dtype=_DTYPES[dtype], code=12 + tile // 2, half=tile % 2) for tile in range(8))


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
    multiply_operands, fence_operands = gl.constexpr(MULTIPLY_OPERANDS), gl.constexpr(FENCE_OPERANDS)
    swap, swap_operands, fence = gl.constexpr(SWAP), gl.constexpr(SWAP_OPERANDS), gl.constexpr(FENCE)

    @gluon.constexpr_function
    def along(layout, dimension):  # type: ignore[no-untyped-def]
        for other in (4, 3, 2, 1, 0):
            layout = layout if other == dimension else gl.SliceLayout(other, layout)
        return layout

    @gluon.jit(do_not_specialize=["tokens", "rows", "eighths", "strips", "chunks"])  # one binary for every shape
    def skinny(  # type: ignore[no-untyped-def]
        blocks, x, bias, y, tokens, rows, eighths, strips, chunks, MULTIPLY: gl.constexpr,
        WIDE: gl.constexpr, EIGHTS: gl.constexpr, WARPS: gl.constexpr, BIAS: gl.constexpr,
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
            at = blocks + ((strip * chunks + chunk) * 1152 + lane * 4 + word)
            codes = gl.load(at, mask=ok, other=0x44444444, eviction_policy="evict_first")
            a = ()
            for tile in gl.static_range(8):
                a += (gl.load(at + (128 + 128 * tile), mask=ok, other=0, eviction_policy="evict_first"),)
            codes = gl.inline_asm_elementwise(fence, fence_operands, [codes], dtype=gl.int32, is_pure=False, pack=4)
            eighth = chunk * 32 + lane % 4
            for tile in gl.static_range(8):
                x_ok = (token < tokens - first) & (eighth + 4 * tile < eighths)
                mine = gl.load(x_at + (chunk * 128 + 16 * tile), mask=x_ok, other=0)
                b = gl.inline_asm_elementwise(swap, swap_operands, [mine], dtype=gl.int32, is_pure=True, pack=4)
                args = [a[tile], b, codes, sums]
                sums = gl.inline_asm_elementwise(
                    MULTIPLY[tile], multiply_operands, args, dtype=gl.float32, is_pure=True, pack=4
                )
        total = gl.sum(sums, 2, keep_dims=True)
        row = strip * 16 + lane // 4 + word // 2 * 8
        token = eight * 8 + lane % 4 * 2 + word % 2  # the one this lane has summed
        if BIAS:
            total += gl.load(bias + row, mask=row < rows, other=0).to(gl.float32)
        y_at = y + first.to(gl.int64) * rows + (token * rows + row)
        gl.store(y_at, total.to(y.dtype.element_ty), mask=(row < rows) & (token < tokens - first))

    return skinny
