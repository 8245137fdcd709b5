"""The contract of a sparse linear kernel, and the choice of one for a layer.

A kernel is one file of this folder; its name is the file's name. It offers four things:

    PRIORITY: int                                   higher is tried first
    refuse(spec) -> str | None                      why it cannot serve this layer here, or None if it can
    prepare(packed) -> dict[str, Tensor]            its private layout, built once at load; never stored on disk
    linear(x_TI, tensors, bias_O) -> y_TO           y = x W^T + b, as a torch custom op with a fake implementation

The layout a kernel wants (index nibbles, swizzles, a vendor's blob) is its own matter; what it receives is always the
stored form: values and bitmask, and where the values are 8-bit codes (`spec.values` says so) one float32 scale a row.
`choose` tries kernels in order of priority and keeps every reason given. A kernel asked
for by name that refuses is an error with its reason: there is no silent fallback, so nobody benchmarks the wrong thing.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

import sparse_serve.kernels as _folder
from maskgen.core.folder import load, names
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT
from sparse_serve.errors import KernelError

AUTO = "auto"


@dataclass(frozen=True)
class LinearSpec:
    """What a kernel must know to accept or refuse a layer: shape per rank, pattern, activation dtype and device.

    `values` is how the weight's values are stored: `float` (then in `dtype`), `int8` or `fp8_e4m3`.
    """

    out_features: int
    in_features: int
    pattern: NMPattern
    dtype: torch.dtype
    device_type: str
    values: str = FLOAT


class Kernel(Protocol):
    """The four members of a kernel file; see the module docstring."""

    __name__: str
    PRIORITY: int

    def refuse(self, spec: LinearSpec) -> str | None:
        """Why this kernel cannot serve `spec` on this machine, or None."""

    def prepare(self, packed: PackedTensor) -> dict[str, Tensor]:
        """Turn values `[O, I*n/m]`, bitmask `[O, I/8]` and a scale `[O]` or None into the tensors `linear` wants."""

    def linear(self, x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        """`[..., I] -> [..., O]` in x's dtype."""


def kernel_name(kernel: Kernel) -> str:
    """The name a user gives to force it: its file name."""
    return kernel.__name__.rpartition(".")[2]


def choose(spec: LinearSpec, wanted: str = AUTO) -> Kernel:
    """The kernel for a layer: the one asked for, or the first by priority that does not refuse.

    Raises `KernelError` listing every reason when none is left, or when the one asked for refuses or does not exist.
    """
    candidates = names(_folder) if wanted == AUTO else [wanted]
    kernels = [cast(Kernel, load(_folder, name, KernelError)) for name in candidates]
    kernels.sort(key=lambda kernel: -kernel.PRIORITY)
    reasons = []
    for kernel in kernels:
        reason = kernel.refuse(spec)
        if reason is None:
            return kernel
        reasons.append(f"{kernel_name(kernel)}: {reason}")
    raise KernelError(
        f"no kernel for a {spec.pattern} weight [{spec.out_features}, {spec.in_features}], {spec.dtype}, "
        f"{spec.values} values, on {spec.device_type}: {'; '.join(reasons)}"
    )
