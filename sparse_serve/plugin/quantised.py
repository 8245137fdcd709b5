"""The quantised dense linear layers of stock vLLM on a CPU: what a user would pick in a sparse one's place.

They are vLLM's own kernels on codes to the nearest; which code a weight has changes no time.

Legend: T = tokens, O = out features, I = in features, G = groups of a row, W = words of eight codes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from platform import machine
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.core import int4
from maskgen.core.values import INT8, to_codes
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning.measure import Linear

GROUPS = (128, 64, 32)
"""How many weights may share an int4 scale, the usual number of GPTQ's and AWQ's checkpoints first."""

NO_INT4 = "vLLM has layers of int4 weights with AVX-512 only, which this processor lacks"
"""Why a processor has no int4 layer of stock vLLM at all."""

_CODE, _SCALE, _ZERO = "codes", "scale", "zero"


@dataclass(frozen=True)
class QuantisedLayer:
    """`copy` makes a function x `[T, I]` -> y `[T, O]` with a weight of its own, of `nbytes` with its scales."""

    copy: Callable[[], Linear]
    nbytes: int


def w8a8(weight_OI: Tensor) -> QuantisedLayer:
    """int8 weights with a scale a row; activations are rounded to int8 too, with a scale for each token.

    Raises `KernelError` for float32 where vLLM's kernel for AMX would take the layer, which has none.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
    from vllm.utils.torch_utils import set_default_torch_dtype

    if weight_OI.dtype is torch.float32 and check_cpu_sgl_kernel(*weight_OI.shape, torch.int8):
        raise KernelError(
            f"vLLM's W8A8 has no layer of {list(weight_OI.shape)} in torch.float32 with AMX: 16 bits only"
        )
    codes_OI, scale_O = to_codes(weight_OI, INT8)
    config = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
    absent = ("input_scale", "input_zero", "zero_product")

    def copy() -> Linear:
        layer = _layer(codes_OI.clone(), scale_O[:, None])
        layer.logical_widths = [weight_OI.shape[0]]
        for name in absent:
            layer.register_parameter(name, None)
        kernel = CPUInt8ScaledMMLinearKernel(config, [_CODE, _SCALE, *absent])
        with set_default_torch_dtype(weight_OI.dtype):  # that of the results
            kernel.process_weights_after_loading(layer)
        return _runs(kernel, layer)

    return QuantisedLayer(copy, codes_OI.nbytes + scale_O.nbytes)


def int4_layer(weight_OI: Tensor) -> QuantisedLayer:
    """int4 weights with a scale for the longest of `GROUPS` that is whole; activations as `int4_name` says.

    Raises `KernelError` for a layer that vLLM does not take, and for every layer where `has_int4` is false.
    """
    if not has_int4():
        raise KernelError(f"vLLM's {int4_name()}: {NO_INT4}")
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    shape, dtype, name = (weight_OI.shape[1], weight_OI.shape[0]), weight_OI.dtype, int4_name()
    group = common_group([weight_OI.shape[1]])
    config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, dtype, group or GROUPS[0], zero_points=False)
    fits, reason = CPUWNA16LinearKernel.can_implement(config)
    if not fits or group is None or dtype is not torch.bfloat16:
        wanted = f"bfloat16 and inputs in groups of one of {GROUPS}"
        raise KernelError(f"vLLM's {name} has no layer of {list(weight_OI.shape)} in {dtype}: {reason or wanted}")
    scale_OG = int4.fit_scales(weight_OI, group)
    codes_OGI = int4.nearest(weight_OI.float().unflatten(1, (-1, group)), scale_OG[..., None])
    words_OW = to_words(codes_OGI.flatten(1))
    layer = _layer(words_OW, scale_OG.to(dtype))
    layer.codes.input_dim = layer.codes.packed_dim = 1
    layer.scale.output_dim = 0
    kernel = CPUWNA16LinearKernel(config, _CODE, _SCALE, _ZERO)
    kernel.process_weights_after_loading(layer)
    nbytes = words_OW.nbytes + scale_OG.numel() * dtype.itemsize
    return QuantisedLayer(lambda: _runs(kernel, deepcopy(layer)), nbytes)


def common_group(in_features: Collection[int]) -> int | None:
    """The first of `GROUPS` that is whole in layers of so many inputs; None if none is."""
    return next((group for group in GROUPS if not any(inputs % group for inputs in in_features)), None)


def has_int4() -> bool:
    """Whether vLLM's library for this processor can multiply with int4 weights; that for x86-64 with AVX2 cannot."""
    return machine() != "x86_64" or bool(torch.cpu._is_avx512_supported())


def has_w4a8() -> bool:
    """Whether vLLM can round activations to int8 with int4 weights here; it does unless VLLM_CPU_INT4_W4A8=0."""
    return bool(torch.cpu._is_amx_tile_supported())


def int4_name() -> str:
    """What vLLM's int4 layers are in this process."""
    from vllm import envs

    return "W4A8" if envs.VLLM_CPU_INT4_W4A8 and has_w4a8() else "W4A16"


def peers() -> dict[str, Callable[[Tensor], QuantisedLayer]]:
    """What makes those that vLLM has here, by name."""
    return {"vllm W8A8": w8a8, f"vllm {int4_name()}": int4_layer}


def to_words(codes_OI: Tensor) -> Tensor:
    """Codes from -8 to 7 as int32 `[O, W]`: 8 is added to each, and the first of eight has the lowest bits."""
    nibbles_OW8 = (codes_OI.to(torch.int64) + 8).unflatten(1, (-1, 8))
    words_OW = (nibbles_OW8 << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words_OW < 1 << 31, words_OW, words_OW - (1 << 32)).to(torch.int32)


def _layer(codes: Tensor, scale: Tensor) -> Any:
    """What vLLM's kernels take their parameters from."""
    layer: Any = nn.Module()
    layer.bias = None
    for name, tensor in ((_CODE, codes), (_SCALE, scale)):
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return layer


def _runs(kernel: Any, layer: Any) -> Linear:
    def run(x_TI: Tensor) -> Tensor:
        y_TO: Tensor = kernel.apply_weights(layer, x_TI)
        return y_TO

    return run
