"""The native CPU kernel for 2:4 weights: reads the compressed bytes once per step and never keeps them dense.

Layout (`sparse_serve/kernels/csrc/layout.h`). Blocks of 16 rows by 128 columns: of each group of 4 columns a code of 4
bits that numbers the kept pair, one of 6, and the two values. Columns are padded to a multiple of 128. One layout
serves every number of tokens.

Traffic. A step of one token is one sequential read of the weight: 2,304 bytes a block where dense bfloat16 has 4,096,
0.5625 of it (0.3125 with int8 values, 1,280 bytes; 0.2031 with int4 ones, 832 bytes), so that 1.78x (3.2x, 4.9x) is all
that fewer bytes can give. fp8 values are kept as the bfloat16 numbers they are. Up to 16 tokens share one read, with
AVX2 up to 8, of many 64 (AVX2: 32), and with AMX 512. Activations are turned into tables, up to 8 times their size, in
a cache, or for AMX into tiles. Threads share rows, and of many tokens those too (`share.h`).

Arithmetic. Half of the products of a dense linear are left, so what else a product takes decides the speed. There are
two ways to make the same products in the same order (`linear.h`, `many.h`):

    rows in lanes      16 rows at once: 1 load of weights, and per token 1 permute that picks 16 pairs of inputs from a
                       table of 6 by the codes, 1 product of pairs (vdpbf16ps). With AVX2 8 rows: 2 permutes within 128
                       bits pick the left and the right inputs, 2 multiply-adds
    tokens in lanes    64 tokens at once: the code of a row is the address of 64 ready pairs; per 16 tokens 1 product
                       with an operand from memory, and per 64 tokens 1 broadcast of two values. With AVX2 32 tokens of
                       two rows: a code is two addresses, of inputs in float32; per 8 tokens 2 multiply-adds

A dense kernel needs two products where this one needs a product and either a permute, which the processor makes in the
same place, or an operand from the cache; so with many tokens it can be less than twice as fast (docs/kernels.md has
times).

AMX multiplies 16 by 32 by 16 numbers with one instruction, sixteen times what a product of pairs does, so there the way
is another (`amx.cpp`): a few blocks at a time are made dense in the nearest cache, for all tokens at once, zeros and
all, while the blocks before are multiplied. It costs as many products as a dense layer, and reads half the bytes. It is
for bfloat16 activations with int8 and int4 values from three tokens on, and with bfloat16 values from five; the rest
goes AVX-512's way.

The best of AMX, AVX-512 with bfloat16 and AVX2 is chosen when the library is first used; products of bytes, for which
activations have to be rounded to int8, are `cpu_int8`'s. Linux gives tiles to a process that asks; where it refuses,
AVX-512 it is.

int4 values have their scale in each block: its 64 kept values are never of two groups. Codes become bfloat16 numbers by
one permute of a table of 16, for two values at once. Tiles of AMX hold codes too, and sums of 128 columns are scaled.

Exactness. Nothing is rounded before the product: bfloat16 activations meet bfloat16, int8 and int4 values (which are
bfloat16 numbers too) in bfloat16 products with float32 sums, as in a dense bfloat16 linear. Where float16 or float32
takes part, in activations or in values, both become float32 first. A token's result does not depend on the other tokens
of its batch, nor on the number of threads. On the instruction set it does, by the order of the sum; so with AMX and
bfloat16 values a batch of up to four tokens, with codes of up to two, gives other last bits than a larger one. By
tiles an input that is not finite shows in every row, as in a dense layer, otherwise in those that keep its column.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FP8, INT4
from sparse_serve.kernels import LinearSpec, every_reason

LIBRARY = "sparse_serve.kernels._cpu_kernel"
ISAS = ("portable", "avx2", "avx512", "amx")
"""Instruction sets in the library, by their number there."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PATTERN = NMPattern(2, 4)


def unsupported_reason(spec: LinearSpec) -> str | None:
    """Only 2:4 on a CPU, and where the native library was built."""
    return every_reason(
        (spec.device_type != "cpu", f"device {spec.device_type} is not cpu"),
        (spec.pattern != _PATTERN, f"pattern {spec.pattern} is not 2:4"),
        (spec.dtype not in _DTYPES, f"dtype {spec.dtype} is not one of {list(_DTYPES)}"),
    ) or (library_problem() or _too_old())


def _too_old() -> str | None:
    slow = "this processor lacks AVX2, FMA or F16C, and without them large batches are slow"
    return slow if isa() == ISAS[0] else None


def isa() -> str:
    """The instruction set it uses on this processor."""
    return ISAS[torch.ops.sparse_serve_cpu.isa()]


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """The weight in blocks of 16 rows by 128 columns; and `form` `[O, 0, I]`, which carries O, I and a dtype."""
    values = packed.values.to(torch.bfloat16) if packed.kind == FP8 else packed.values
    for half in (torch.bfloat16, torch.float16):
        if values.dtype is torch.float32 and all(
            torch.equal(part.to(half).float(), part) for part in values.split(256)
        ):
            values = values.to(half)  # a 16-bit checkpoint served in float32: half the bytes, the same numbers
    scale = None if packed.scale is None else packed.scale.contiguous()
    inside, beside = (scale, None) if packed.kind == INT4 else (None, scale)
    blocks = torch.ops.sparse_serve_cpu.pack(values.contiguous(), packed.bitmask.contiguous(), inside)
    tensors = {"blocks": blocks, "form": values.new_empty((packed.shape[0], 0, packed.shape[1]))}
    return tensors if beside is None else {**tensors, "scale": beside}


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]`."""
    y_TO: Tensor = torch.ops.sparse_serve_cpu.linear(
        x_TI, tensors["blocks"], tensors["form"], tensors.get("scale"), bias_O
    )
    return y_TO


@cache
def library_problem() -> str | None:
    """None, once the native library is loaded; or why that cannot be done."""
    spec = find_spec(LIBRARY)
    if spec is None or spec.origin is None:
        return (
            "the native library was not built when this was installed (SPARSE_SERVE_NATIVE=off, or no Linux); with a "
            "C++ compiler, in the folder of the sources: pip install --no-deps --force-reinstall ."
        )
    try:
        torch.ops.load_library(spec.origin)
        torch.library.register_fake("sparse_serve_cpu::linear", _fake)
        torch.library.register_fake("sparse_serve_cpu::linear_int8", _fake)
        torch.library.register_fake("sparse_serve_cpu::dense_int8", _fake)
        torch.library.register_fake("sparse_serve_cpu::add_correction", lambda y_TO, *_: y_TO.new_empty(y_TO.shape))
    except (OSError, RuntimeError) as error:
        return f"the native library {spec.origin} cannot be used here: {error}"
    return None


def dense_int8_problem() -> str | None:
    """None, or why dense int8 layers (`csrc/dense_ops.cpp`) cannot be had here."""
    if problem := library_problem():
        return problem
    return None if torch.ops.sparse_serve_cpu.vnni() else "this processor lacks AVX-512 with VNNI"


def correction_problem(dtype: torch.dtype) -> str | None:
    """None, or why corrections of this dtype (`csrc/correction_ops.cpp`) cannot be had here."""
    if problem := library_problem():
        return problem
    return every_reason(
        (dtype is not torch.bfloat16, f"dtype {dtype} is not {torch.bfloat16}"),
        (not torch.ops.sparse_serve_cpu.corrects(), "this processor lacks AVX-512 with bfloat16"),
    )


def _fake(
    x_TI: Tensor, blocks: Tensor, form: Tensor, scale_O: Tensor | None, bias_O: Tensor | None, *way: int
) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], form.shape[0]))
