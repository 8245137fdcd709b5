"""The native CPU kernel for 2:4 weights: reads the compressed bytes once per step and never makes them dense.

`sparse_serve/csrc/layout.h` says how a weight lies in memory and `linear.h` how it is multiplied, for AVX-512, AVX2 and
any other processor. One layout serves every number of tokens: decoding is one sequential read of 0.5625 of the bytes of
a dense bfloat16 weight (0.3125 with int8 values), and with more tokens half of the products of a dense linear remain.

Nothing is rounded before the product: bfloat16 activations meet bfloat16 and int8 values (which are bfloat16 numbers
too) in bfloat16 products with float32 sums, as in a dense bfloat16 linear, and float32 activations stay float32. A
token's result does not depend on the other tokens of its batch, nor on the number of threads.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT
from sparse_serve.kernels import LinearSpec, every_reason

LIBRARY = "sparse_serve._cpu_kernel"
ISAS = ("portable", "avx2", "avx512")
"""Instruction sets in the library, by their number there."""

_DTYPES = (torch.bfloat16, torch.float32)
_VALUES = (FLOAT, "int8")
_PATTERN = NMPattern(2, 4)


def refuse(spec: LinearSpec) -> str | None:
    """Only 2:4 on a CPU, in bfloat16 or float32, and where the native library was built."""
    return every_reason(
        (spec.device_type != "cpu", f"device {spec.device_type} is not cpu"),
        (spec.pattern != _PATTERN, f"pattern {spec.pattern} is not 2:4"),
        (spec.dtype not in _DTYPES, f"dtype {spec.dtype} is not one of {list(_DTYPES)}"),
        (spec.values not in _VALUES, f"values {spec.values} are not one of {list(_VALUES)}"),
    ) or (_problem() or _too_old())


def _too_old() -> str | None:
    slow = "this processor has neither AVX2 nor AVX-512, and without them large batches are slow"
    return slow if isa() == ISAS[0] else None


def isa() -> str:
    """The instruction set it uses on this processor."""
    return ISAS[torch.ops.sparse_serve_cpu.isa()]


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """The weight in blocks of 16 rows by 128 columns; and `form` `[O, 0, I]`, which carries O, I and a dtype."""
    values = packed.values
    if values.dtype is torch.float32 and torch.equal(values.bfloat16().float(), values):
        values = values.bfloat16()  # a bfloat16 checkpoint served in float32: half the bytes, the same numbers
    blocks = torch.ops.sparse_serve_cpu.pack(values.contiguous(), packed.bitmask.contiguous())
    tensors = {"blocks": blocks, "form": values.new_empty((packed.shape[0], 0, packed.shape[1]))}
    return tensors if packed.scale is None else {**tensors, "scale": packed.scale.contiguous()}


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]`."""
    y_TO: Tensor = torch.ops.sparse_serve_cpu.linear(
        x_TI, tensors["blocks"], tensors["form"], tensors.get("scale"), bias_O
    )
    return y_TO


@cache
def _problem() -> str | None:
    """Load the library, once; or why that cannot be done."""
    spec = find_spec(LIBRARY)
    if spec is None or spec.origin is None:
        return (
            "the native library is not built; it needs a C++ compiler and torch present: "
            "pip install --no-build-isolation --no-deps --force-reinstall sparse-serve"
        )
    try:
        torch.ops.load_library(spec.origin)
        torch.library.register_fake("sparse_serve_cpu::linear", _fake)
    except (OSError, RuntimeError) as error:
        return f"the native library {spec.origin} cannot be used here: {error}"
    return None


def _fake(
    x_TI: Tensor, blocks: Tensor, form: Tensor, scale_O: Tensor | None, bias_O: Tensor | None, isa: int = -1
) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], form.shape[0]))
