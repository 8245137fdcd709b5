"""In which arithmetic matrix products are computed while a model runs on calibration text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices faster than float32 ones.

    Processors without instructions for it emulate it, which is slower; on those that are known here, these instructions
    are AVX512-BF16 and AMX.
    """
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def products_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 for a model that is stored in it, where `device` multiplies that faster; else float32.

    Such a model computes in bfloat16 when it is served, too.
    """
    fast = stored is torch.bfloat16 and multiplies_bfloat16(device)
    return torch.bfloat16 if fast else torch.float32


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
