"""The CPU kernel with activations rounded to int8: twice the products for each instruction, for a known error.

The weight lies in memory as `cpu` has it, with int8 or int4 values. Of each token every 128 inputs are rounded to 255
steps, the largest magnitude being 127 of them; in layers with 1024 inputs or more every 256, with 4096 or more every
512. The products of whole numbers are summed exactly (`csrc/rounded.h`), and the sums of so many columns, scaled, in
float32; of int4 values, which have scales of their own, those of 128. Beyond the inputs only what every kernel rounds
is rounded: float32 sums, and outputs to their dtype. A token's result depends neither on the other tokens of its batch
nor on the number of threads.

Rounding moves an input by 1/254 of the largest of those with which it shares a scale at most. vLLM's dense W8A8 layers
have one scale for the whole token, which an outlier stretches for all of its inputs; on SmolLM2-135M that costs three
times the divergence (docs/kernels.md). Here a token has four scales at least, from 512 inputs on. It is an error all
the same; so a layer is served like this only where the user says so (`LinearSpec.activations`).

Arithmetic. With AVX-512 VNNI and VBMI (`csrc/vnni.cpp`) the 8 inputs of two groups are in every lane; per token and 8
columns of 16 rows, one byte shuffle picks those that the rows keep, and one instruction (vpdpbusd) multiplies 64 pairs
and adds them by four. A dense layer takes two such products, and no shuffle, which a Zen 4 makes in another place: in a
loop of nothing else this is 1.4 times as fast as dense int8, whose weights have 1.6 times (of int4 values 2.5 times) as
many bytes.

With AVX2 (`csrc/avx2_int8.cpp`) products of bytes are added by two, in 16 bits. int4 values are so small that eight of
them fit before they have to be widened; int8 values are widened one by one, which takes half as long again.

With AMX, from nine tokens on, a few blocks at a time are made dense in the nearest cache, as bytes, and tiles of 16
tokens by 16 rows by 64 columns are multiplied (`csrc/amx_int8.cpp`). There the scales are what takes time, so large
layers have fewer: with int8 values, by 512 they are a third faster than by 128.

Sums of codes are exact in every way, and what is added to them in float32 is the same in the same order: so are the
results, bit by bit.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskgen.core.packed import PackedTensor
from maskgen.core.values import INT4, INT8
from sparse_serve.kernels import LinearSpec, cpu, unsupported_values


def share_a_scale(inputs: int) -> int:
    """How many consecutive inputs of a layer with so many are rounded with one scale."""
    return 512 if inputs >= 4096 else 256 if inputs >= 1024 else 128


def unsupported_reason(spec: LinearSpec) -> str | None:
    """Only where activations may be rounded, values are codes, and the processor has AVX2, FMA and F16C."""
    lacking = unsupported_values(spec, INT8, INT4) or cpu.unsupported_reason(spec) or _missing_instructions()
    unasked = 'activations are not to be rounded to int8 ("activations": "int8" allows it)'
    return lacking or (unasked if spec.activations != INT8 else None)


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """As `cpu.prepare`."""
    return cpu.prepare(packed)


def multiplied(x_TI: Tensor) -> Tensor:
    """The inputs that it multiplies, `[..., I]` in float64: `share_a_scale` of x at a time rounded to 255 steps.

    Where one of them is not finite none is a number; where all are next to nothing they are zero.
    """
    columns = x_TI.shape[-1]
    together = share_a_scale(columns)
    x = pad(x_TI.float(), (0, -columns % together)).unflatten(-1, (-1, together))
    largest = x.abs().amax(-1, keepdim=True)  # NaN if there is one
    each = torch.full_like(largest, 127).div(largest)  # 127 / largest would be rounded twice
    counts, finite = largest > 1e-30, largest.isfinite()
    step = torch.where(finite, torch.where(counts, largest / 127, 0.0), torch.nan).double()
    codes = (x * torch.where(counts & finite, each, 0.0)).round().nan_to_num(0.0)
    return codes.double().mul_(step).flatten(-2)[..., :columns]


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]` in x's dtype."""
    y_TO: Tensor = torch.ops.sparse_serve_cpu.linear_int8(
        x_TI, tensors["blocks"], tensors["form"], tensors.get("scale"), bias_O
    )
    return y_TO


@cache
def _missing_instructions() -> str | None:
    """Asked once, when the library is there."""
    return None if torch.ops.sparse_serve_cpu.int8_isa() else "this processor lacks AVX2, FMA or F16C"
