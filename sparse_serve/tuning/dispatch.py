"""How one layer is served: a kernel, or one for few tokens and another for many.

A `Plan` is written as text, `32=skinny,*=cusparselt`, and that text is all the state there is: it travels through
torch.compile and CUDA graphs as a constant. Each of its kernels has its own layout of the weight in memory. With one
kernel the layer calls it directly. With several, a custom op looks at the number of tokens: torch.compile must not see
that decision, since it would compile for one number and keep it.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

import sparse_serve.kernels as folder
from maskgen.core.packed import PackedTensor
from maskgen.core.registry import load
from sparse_serve.kernels import Kernel, multiplied
from sparse_serve.runtime.errors import KernelError

ANY = "*"
_JOIN = "__"


@dataclass(frozen=True)
class Step:
    """`kernel` serves up to `tokens` tokens (None: any number) that no step before it takes."""

    tokens: int | None
    kernel: str


@dataclass(frozen=True)
class Plan:
    """Steps of rising numbers of tokens; the last one takes any."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        bounds = [step.tokens for step in self.steps]
        last = bounds.pop() if bounds else 0
        rising = all(bound is not None and bound > 0 for bound in bounds)
        if last is not None or not rising or not all(a < b for a, b in pairwise(cast(list[int], bounds))):
            raise KernelError(f"plan {self}: expected rising numbers of tokens, then {ANY} for all others")

    @classmethod
    def of(cls, kernel: str) -> Plan:
        """One kernel for everything."""
        return cls((Step(None, kernel),))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The inverse of `str`. Raises `KernelError`."""
        parts = [part.partition("=") for part in text.split(",")]
        if not all(name and (bound == ANY or bound.isdecimal()) for bound, _, name in parts):
            raise KernelError(f"plan {text!r}: expected TOKENS=KERNEL,...,{ANY}=KERNEL")
        return cls(tuple(Step(None if bound == ANY else int(bound), name) for bound, _, name in parts))

    def __str__(self) -> str:
        return ",".join(f"{step.tokens or ANY}={step.kernel}" for step in self.steps)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Its kernels, each once, in the order of their first step."""
        return tuple(dict.fromkeys(step.kernel for step in self.steps))

    def kernel_for(self, tokens: int) -> str:
        """The name of the kernel that serves so many tokens."""
        return next(step.kernel for step in self.steps if step.tokens is None or tokens <= step.tokens)

    def multiplied(self, tokens: int, x_TI: Tensor) -> Tensor:
        """The inputs that the kernel for so many tokens multiplies, in float64."""
        return multiplied(_kernel(self.kernel_for(tokens)), x_TI)

    def prepare(self, packed: PackedTensor) -> dict[str, Tensor]:
        """The layouts of its kernels, tensors named `KERNEL__NAME`."""
        return {
            f"{name}{_JOIN}{key}": tensor
            for name in self.kernels
            for key, tensor in _kernel(name).prepare(packed).items()
        }

    def bind(self) -> Bound:
        """The plan with its kernels looked up, which torch.compile could not do."""
        return Bound(str(self), _kernel(self.kernels[0]) if len(self.kernels) == 1 else None)


@dataclass(frozen=True)
class Bound:
    """What a layer calls: its only kernel, or the op that picks one."""

    text: str
    kernel: Kernel | None

    def linear(self, x_TI: Tensor, tensors: Mapping[str, Tensor], bias_O: Tensor | None, out_features: int) -> Tensor:
        """`[..., I] -> [..., O]` in x's dtype; `tensors` as `Plan.prepare` names them."""
        if self.kernel is not None:
            return self.kernel.linear(x_TI, {key.partition(_JOIN)[2]: each for key, each in tensors.items()}, bias_O)
        y_TO: Tensor = by_tokens(x_TI, list(tensors.values()), ",".join(tensors), bias_O, self.text, out_features)
        return y_TO


@torch.library.custom_op("sparse_serve::by_tokens", mutates_args=())
def by_tokens(
    x_TI: Tensor, tensors: Sequence[Tensor], names: str, bias_O: Tensor | None, plan: str, out_features: int
) -> Tensor:
    """Run the step of `plan` that x's number of tokens asks for."""
    step = _parsed(plan).kernel_for(x_TI.numel() // max(1, x_TI.shape[-1]))
    return _kernel(step).linear(x_TI, _of(step, dict(zip(names.split(","), tensors, strict=True))), bias_O)


@by_tokens.register_fake
def _fake(
    x_TI: Tensor, tensors: Sequence[Tensor], names: str, bias_O: Tensor | None, plan: str, out_features: int
) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], out_features))


_parsed = cache(Plan.parse)


@cache
def _kernel(name: str) -> Kernel:
    return cast(Kernel, load(folder, name, KernelError))


def _of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = name + _JOIN
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
