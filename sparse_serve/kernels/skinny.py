# mypy: disable-error-code="name-defined, assignment, var-annotated"
# (the Gluon kernel is annotated with names of a module that is imported when it is first used)
"""The decode kernel for 2:4 weights on NVIDIA GPUs: few tokens, so time is the bytes of the weight, read once.

The sparse tensor core multiplies a 16 x 32 weight tile of which it is given only the kept half and, per group of four
columns, a column code: 4 bits for the two that are kept (`mma.sp`, PTX ISA, m16n8k32). Nothing is decompressed: the
weight goes from memory to registers to the tensor core, and what it costs is 0.5625 of a dense weight's bytes.

Values stored in 8 bits cost 0.3125, int4 ones 0.1875 and their scales. They are read as they are, expanded in registers
to the activations' dtype, which holds every one of them exactly, and multiplied by the same instruction. A row's scale
multiplies the finished sum, in float32. Where a row has scales for groups of 64 or 128 kept values, a chunk of 256
columns is two such groups or one, and each multiplies the sum of its group. So nothing is rounded but the sums and the
result. Where a value and a scale lie is said in `_skinny_layout`, how values are expanded in `_ptx`.

Work. A program serves one or two strips and up to 32 tokens; its warps take the chunks in turn, and their sums are
added at the end in a fixed order, so results repeat bit for bit. What decides the speed is how many bytes are in
flight: a warp issues all loads of a chunk, 9 of 512 bytes (with 8-bit values 5, with int4 ones 3 and those of scales),
before its first product, and a fence keeps the assembler from moving a load down to its use, which it does when left
alone. More than 32 tokens run as passes of 32 over the same weight, side by side, which only the L2 cache softens;
other kernels are better there.

int4 values have not run on a GPU yet; tests run what Triton compiles in an emulator.

Legend: T = tokens, O = out features, I = in features, S = strips, C = chunks, W = words; in the Gluon kernel the
dimensions are strips, tokens / 8, warps, lanes and a lane's 4 words.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.values import CODE_DTYPES, FLOAT, FP8, INT4, INT8, kind_of
from sparse_serve.kernels import (
    LinearSpec,
    _ptx,
    _skinny_layout,
    capability_unsupported_reason,
    sparse_core_unsupported_reason,
    unsupported_values,
)

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
VALUES = (FLOAT, INT8, FP8, INT4)
"""Kinds of values it takes."""


def unsupported_reason(spec: LinearSpec) -> str | None:
    """Only 2:4 in bfloat16 or float16 on an NVIDIA GPU with sparse tensor cores, where Triton has Gluon.

    Shapes of any size are taken, padded to whole strips and chunks.
    """
    return (
        sparse_core_unsupported_reason(spec, _DTYPES)
        or unsupported_values(spec, *VALUES)
        or _skinny_layout.unsupported_group(spec.group)
        or capability_unsupported_reason()
        or _problem()
    )


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """`blocks` int32 `[S, C, W]`; `form` `[O, 0, I]`, which carries O, I and a dtype; of codes without groups `scale`.

    The scales of groups are in the blocks.
    """
    rows, columns = packed.shape
    tensors = {"blocks": _skinny_layout.blocks_of(packed), "form": packed.values.new_empty((rows, 0, columns))}
    return tensors if packed.scale is None or packed.group else {**tensors, "scale": packed.scale.contiguous()}


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]`."""
    y_TO: Tensor = skinny_linear(x_TI, tensors["blocks"], tensors["form"], tensors.get("scale"), bias_O)
    return y_TO


def split(tokens: int, strips: int, chunks: int, has_groups: bool = False) -> tuple[int, int]:
    """Strips and warps of a program: within 7 % of the fastest on an H200, summed over a Llama-3-8B block. Of
    float and int8 values, that is; for int4 ones nothing has been measured.

    Several strips share the activations, which come from the L2 cache and from 9 tokens on are as many bytes as the
    weights. Where strips are many, a program has four of them and a single warp, so nothing is summed over warps; where
    they are few, warps have to share a strip to fill the GPU, eight if it is long. Where groups have scales
    (`has_groups`) a lane holds two sets of sums, and for 32 tokens registers hold those of two strips, not of four.
    """
    if strips >= 1024:
        return (2 if has_groups and tokens > 16 else 4), 1
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
    _check_input(x_TI, form, bias_O)
    constants = instructions(x_TI.dtype, form.dtype)
    scales = _skinny_layout.scales_of(blocks, constants["LOADS"])
    _check_scale(scale_O, form, scales)
    y_TO = x_TI.new_empty((*x_TI.shape[:-1], rows))
    tokens = y_TO.numel() // rows
    if tokens == 0:
        return y_TO
    flat_TI = x_TI.reshape(tokens, columns).contiguous()
    if flat_TI.data_ptr() % 16:
        flat_TI = flat_TI.clone()  # a slice that starts inside one of the 16-byte words the kernel loads
    strips, chunks = blocks.shape[:2]
    best = split(tokens, strips, chunks, has_groups=scales > 0)
    wide, warps = wide or best[0], warps or best[1]
    eights = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    grid = (-(-tokens // (8 * eights)), -(-strips // wide))
    scale, bias = y_TO if scale_O is None else scale_O, y_TO if bias_O is None else bias_O
    with torch.cuda.device_of(x_TI):
        _kernel()[grid](
            blocks, flat_TI.view(torch.int32), scale, bias, y_TO, tokens, rows, columns // 8, strips, chunks,
            **constants, SCALES=scales, WIDE=wide, EIGHTS=eights, WARPS=warps, BIAS=bias_O is not None, num_warps=warps,
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


def _check_input(x_TI: Tensor, form: Tensor, bias_O: Tensor | None) -> None:
    rows, columns = form.shape[0], form.shape[2]
    dtypes = list(_DTYPES) if form.dtype in CODE_DTYPES.values() else [form.dtype]
    if x_TI.dtype not in dtypes or x_TI.shape[-1] != columns:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"x is {x_TI.dtype} {list(x_TI.shape)}, expected {expected} [..., {columns}]")
    if bias_O is not None and (bias_O.dtype != x_TI.dtype or bias_O.shape != (rows,) or not bias_O.is_contiguous()):
        raise ValueError(f"bias is {bias_O.dtype} {list(bias_O.shape)}, expected contiguous {x_TI.dtype} [{rows}]")


def _check_scale(scale_O: Tensor | None, form: Tensor, scales: int) -> None:
    """`scales` of each row are in every chunk; if none are, codes need one beside."""
    if (scale_O is not None) != (form.dtype in CODE_DTYPES.values() and not scales):
        raise ValueError(
            f"a scale belongs to codes without scales of groups and to no others, and values are {form.dtype}, with "
            f"{scales} scales of groups in a chunk"
        )
    rows = form.shape[0]
    if scale_O is not None and (
        scale_O.dtype != torch.float32 or scale_O.shape != (rows,) or not scale_O.is_contiguous()
    ):
        raise ValueError(f"scale is {scale_O.dtype} {list(scale_O.shape)}, expected contiguous float32 [{rows}]")


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
    fence, words = gl.constexpr(_ptx.FENCE), gl.constexpr(_ptx.WORDS_OPERANDS)
    multiply = _multiply(gluon, gl)

    @gluon.constexpr_function
    def along(layout, dimension):  # type: ignore[no-untyped-def]
        for other in (4, 3, 2, 1, 0):
            layout = layout if other == dimension else gl.SliceLayout(other, layout)
        return layout

    @gluon.jit(do_not_specialize=["tokens", "rows", "eighths", "strips", "chunks"])  # one binary for every shape
    def skinny(  # type: ignore[no-untyped-def]
        blocks, x, scale, bias, y, tokens, rows, eighths, strips, chunks, MULTIPLY: gl.constexpr, EXPAND: gl.constexpr,
        LOADS: gl.constexpr, UNIT: gl.constexpr, SCALES: gl.constexpr, WIDE: gl.constexpr, EIGHTS: gl.constexpr,
        WARPS: gl.constexpr, BIAS: gl.constexpr,
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
            chunk_at = (strip * chunks + chunk) * (128 + 128 * LOADS + 16 * SCALES)
            at = blocks + (chunk_at + lane * 4 + word)
            codes = gl.load(at, mask=ok, other=0x44444444, eviction_policy="evict_first")
            loaded = ()
            for part in gl.static_range(LOADS):
                loaded += (gl.load(at + (128 + 128 * part), mask=ok, other=0, eviction_policy="evict_first"),)
            scales = codes  # which nothing reads where groups have none
            if SCALES > 0:
                scales_at = blocks + (chunk_at + (128 + 128 * LOADS) + lane // 4 * (2 * SCALES) + word % (2 * SCALES))
                scales = gl.load(scales_at, mask=ok, other=0, eviction_policy="evict_first")
            codes = gl.inline_asm_elementwise(fence, words, [codes], dtype=gl.int32, is_pure=False, pack=4)
            eighth, token_ok = chunk * 32 + lane % 4, token < tokens - first
            sums = multiply(
                loaded, codes, scales, x_at, token_ok, chunk, eighth, eighths, sums, MULTIPLY, EXPAND, LOADS, SCALES
            )
        total = gl.sum(sums, 2, keep_dims=True)
        row = strip * 16 + lane // 4 + word // 2 * 8
        token = eight * 8 + lane % 4 * 2 + word % 2  # the one this lane has summed
        if LOADS < 8:
            total *= UNIT
        if LOADS < 8 and SCALES == 0:
            total *= gl.load(scale + row, mask=row < rows, other=0)
        if BIAS:
            total += gl.load(bias + row, mask=row < rows, other=0).to(gl.float32)
        y_at = y + first.to(gl.int64) * rows + (token * rows + row)
        gl.store(y_at, total.to(y.dtype.element_ty), mask=(row < rows) & (token < tokens - first))

    return skinny


def _multiply(gluon: Any, gl: Any) -> Any:
    """What the Gluon kernel adds to its sums for a chunk that is loaded. Sums of groups are scaled on their own."""
    swap, words = gl.constexpr(_ptx.SWAP), gl.constexpr(_ptx.WORDS_OPERANDS)
    multiply_operands, rescale_operands = gl.constexpr(_ptx.MULTIPLY_OPERANDS), gl.constexpr(_ptx.RESCALE_OPERANDS)
    rescale = gl.constexpr(_ptx.RESCALE)

    @gluon.jit
    def multiply(  # type: ignore[no-untyped-def]
        loaded, codes, scales, x_at, token_ok, chunk, eighth, eighths, sums, MULTIPLY: gl.constexpr,
        EXPAND: gl.constexpr, LOADS: gl.constexpr, SCALES: gl.constexpr,
    ):  # fmt: skip
        zeros = gl.full(sums.shape, 0.0, gl.float32, layout=sums.type.layout)
        group = zeros
        for tile in gl.static_range(8):
            a = loaded[tile * LOADS // 8]
            if LOADS < 8:
                a = gl.inline_asm_elementwise(EXPAND[tile % (8 // LOADS)], words, [a], gl.int32, True, 4)
            x_ok = token_ok & (eighth + 4 * tile < eighths)
            b = gl.load(x_at + (chunk * 128 + 16 * tile), mask=x_ok, other=0)
            b = gl.inline_asm_elementwise(swap, words, [b], dtype=gl.int32, is_pure=True, pack=4)
            args = [a, b, codes, group if SCALES > 0 else sums]
            added = gl.inline_asm_elementwise(MULTIPLY[tile], multiply_operands, args, gl.float32, True, 4)
            if SCALES == 0:
                sums = added
            elif (tile + 1) * SCALES % 8 > 0:
                group = added
            else:
                args, group = [added, scales, sums], zeros
                sums = gl.inline_asm_elementwise(
                    rescale[tile * SCALES // 8], rescale_operands, args, gl.float32, True, 4
                )
        return sums

    return multiply
