"""In which arithmetic matrix products are computed, by what the device is fast in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ProductsDtype = Literal["auto", "bfloat16", "float32"]
"""What a recipe says of matrix products; "auto" leaves it to the device."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices faster than float32 ones.

    Processors without instructions for it emulate it, which is slower. These instructions are AVX512-BF16 and AMX, and
    Arm's BF16.
    """
    if device.type == "cpu":
        on_x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that may be installed
        return on_x86 or bool(capabilities.get("bf16"))
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def products_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 for a model that is stored in it, where `device` multiplies that faster; else float32.

    Such a model computes in bfloat16 when it is served, too.
    """
    fast = stored is torch.bfloat16 and multiplies_bfloat16(device)
    return torch.bfloat16 if fast else torch.float32


def settled_dtype(wanted: ProductsDtype, device: torch.device) -> Literal["bfloat16", "float32"]:
    """What "auto" is on `device`: bfloat16 where it is multiplied faster than float32."""
    if wanted == "auto":
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    return wanted


def dtype_of(settled: ProductsDtype) -> torch.dtype:
    """The dtype that a recipe names, once it is settled."""
    assert settled != "auto", "a recipe is settled by Recipe.on_device"
    return torch.bfloat16 if settled == "bfloat16" else torch.float32


@contextlib.contextmanager
def bfloat16_products(device: torch.device) -> Iterator[None]:
    """Linear layers in bfloat16 take about as long as in float32, on processors without instructions for bfloat16 too.

    There `_MANY` tokens and more are multiplied as float32 matrices: products of two bfloat16 numbers are exact in
    float32, sums are float32 in either case, and the result is rounded to bfloat16 once, so it differs by the order of
    sums only. With AVX2 alone, torch takes 8 times as long for bfloat16. A float32 copy of one layer's weight exists
    meanwhile, and as long as a backward pass wants it: this is for forward passes. What is no linear layer (experts in
    one tensor, GPT-2's) is multiplied as it is.
    """
    with contextlib.nullcontext() if multiplies_bfloat16(device) or device.type != "cpu" else _Widened():
        yield


_MANY = 16
"""From so many tokens on, widening the weights takes less time than it saves: measured with AVX2, one thread."""


def _tokens(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


class _Widened(TorchFunctionMode):
    """Linear layers of bfloat16 in float32, their results in bfloat16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if func is not functional.linear or given[0].dtype is not torch.bfloat16 or _tokens(given[0]) < _MANY:
            return func(*args, **kwargs)
        widened: Any = [tensor if tensor is None else tensor.float() for tensor in given]
        named = dict(zip(kwargs, widened[len(args) :], strict=True))
        return functional.linear(*widened[: len(args)], **named).to(torch.bfloat16)


@contextlib.contextmanager
def float32_sums(products: torch.dtype) -> Iterator[None]:
    """Products of float32 matrices stay float32 matrices, whatever autocast is on outside.

    With `products` bfloat16, a CPU rounds what it multiplies to that, as the layers do that receive these inputs, and
    sums up in float32: X^T X is the Gram matrix of the rounded X, and as positive semi-definite. On other devices
    nothing is rounded.
    """
    mkldnn: Any = torch.backends.mkldnn  # has no types
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    try:
        if products is torch.bfloat16:
            matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
