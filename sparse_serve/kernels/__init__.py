"""The contract of a sparse linear kernel.

A kernel is one file of this folder; its name is the file's name. It offers three things:

    unsupported_reason(spec) -> str | None    why it cannot serve this layer on this machine, or None if it can
    prepare(packed) -> dict[str, Tensor]      its own layout of the weight, built once at load; never stored on disk
    linear(x_TI, tensors, bias_O) -> y_TO     y = x W^T + b, as a torch custom op with a fake implementation

and one that rounds its inputs a fourth, by which it can be checked as strictly as any other:

    multiplied(x_TI) -> x_TI                  the inputs that it multiplies, in float64

Whatever layout a kernel wants (index nibbles, swizzles, a vendor's blob), it is given the stored form: values and
bitmask, and where the values are codes (`spec.values` says so) float32 scales: one a row, or of int4 codes, of which
two share a byte, one for each `spec.group` kept values of a row. A kernel that supports a
layer takes any number of tokens; which one is fast at which number is measured (`sparse_serve.tuning.selection`), so a
kernel does not say how good it is. If one that a person asked for by name does not support a layer, that is an error
with its reason and never another kernel, so nobody measures the wrong one.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

import sparse_serve.kernels as _folder
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.registry import load, names
from maskgen.core.values import FLOAT, INT8
from sparse_serve.runtime.errors import KernelError

CAPABILITY = (8, 0)
"""The first NVIDIA GPUs with sparse tensor cores."""


ACTIVATIONS = (FLOAT, INT8)
"""What kernels may make of activations: leave them as they are, or round them to int8."""


@dataclass(frozen=True)
class LinearSpec:
    """What a kernel must know of a layer to support it or not: shape per rank, pattern, activation dtype and device.

    `values` is how the weight's values are stored: `float` (then in `dtype`), `int8`, `fp8_e4m3`, or `int4`, of which
    `group` share a scale (None: those of a row, as for all others). `activations` is `int8` where a kernel may round
    them to that.
    """

    out_features: int
    in_features: int
    pattern: NMPattern
    dtype: torch.dtype
    device_type: str
    values: str = FLOAT
    group: int | None = None
    activations: str = FLOAT

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise KernelError(f"activations are {self.activations!r}, expected one of {list(ACTIVATIONS)}")


def unsupported_values(spec: LinearSpec, *kinds: str) -> str | None:
    """Why a kernel that takes these kinds of values does not take those of `spec`."""
    return None if spec.values in kinds else f"values {spec.values} are none of {list(kinds)}"


class Kernel(Protocol):
    """The three members of a kernel file; see the module docstring."""

    __name__: str

    def unsupported_reason(self, spec: LinearSpec) -> str | None:
        """Why this kernel cannot serve `spec` on this machine, or None."""

    def prepare(self, packed: PackedTensor) -> dict[str, Tensor]:
        """Turn values `[O, I*n/m]`, bitmask `[O, I/8]` and a scale (`PackedTensor`) into the tensors `linear` wants."""

    def linear(self, x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        """`[..., I] -> [..., O]` in x's dtype."""


def supported(spec: LinearSpec) -> tuple[dict[str, Kernel], dict[str, str]]:
    """The kernels that can serve a layer, and of every other one the reason why it cannot; both by name."""
    kernels, reasons = {}, {}
    for name in names(_folder):
        kernel = cast(Kernel, load(_folder, name, KernelError))
        reason = kernel.unsupported_reason(spec)
        if reason is None:
            kernels[name] = kernel
        else:
            reasons[name] = reason
    return kernels, reasons


def choose(spec: LinearSpec, name: str) -> Kernel:
    """The kernel `name`. Raises `KernelError` if there is none, or if it does not support `spec`, with its reason."""
    kernel = cast(Kernel, load(_folder, name, KernelError))
    reason = kernel.unsupported_reason(spec)
    if reason is not None:
        raise no_kernel(spec, {name: reason})
    return kernel


def rounds_inputs(kernel: Kernel) -> bool:
    """Whether a kernel multiplies other inputs than it is given."""
    return hasattr(kernel, "multiplied")


def multiplied(kernel: Kernel, x_TI: Tensor) -> Tensor:
    """The inputs `[..., I]` that a kernel multiplies, in float64: x, unless it rounds."""
    rounds: Callable[[Tensor], Tensor] | None = getattr(kernel, "multiplied", None)
    return x_TI.double() if rounds is None else rounds(x_TI)


def every_reason(*cases: tuple[bool, str]) -> str | None:
    """All reasons of `(holds, reason)` that hold, in one text: a person can mend them at once. None if none holds."""
    return ", ".join(reason for holds, reason in cases if holds) or None


def sparse_core_unsupported_reason(spec: LinearSpec, dtypes: Collection[torch.dtype]) -> str | None:
    """Why `spec` is nothing for NVIDIA's sparse tensor cores: another device, not 2:4, activations not of `dtypes`."""
    is_nvidia = spec.device_type == "cuda" and torch.version.hip is None
    return every_reason(
        (not is_nvidia, f"device {spec.device_type} is not an NVIDIA GPU"),
        (spec.pattern != NMPattern(2, 4), f"pattern {spec.pattern} is not 2:4"),
        (spec.dtype not in dtypes, f"dtype {spec.dtype} is not one of {list(dtypes)}"),
    )


def capability_unsupported_reason() -> str | None:
    """Why the GPU in use has no sparse tensor cores. To be asked last: only here the GPU itself is asked."""
    capability = torch.cuda.get_device_capability()
    too_old = f"compute capability {capability} is below {CAPABILITY}: no sparse tensor cores"
    return too_old if capability < CAPABILITY else None


def no_kernel(spec: LinearSpec, reasons: Mapping[str, str]) -> KernelError:
    """The error that says why nothing can serve a layer."""
    return KernelError(
        f"no kernel for a {spec.pattern} weight [{spec.out_features}, {spec.in_features}], {spec.dtype}, {spec.values} "
        f"values, on {spec.device_type}: {'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}"
    )
