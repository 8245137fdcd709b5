"""The reference kernel: unpack a tile of rows, multiply it, forget it.

It works for every pattern, dtype, device and kind of values, and it is the oracle other kernels are tested against. The
weight stays compressed in memory: at most `TILE_BYTES` of dense weight exist at a time, whatever the layer's size, so
the peak is the compressed model plus one tile. It pays for that with one pass of unpacking per call, which makes it
slower than a dense linear at every batch size. It is here to be right, and to serve where nothing faster can.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from maskgen.core.packed import PackedTensor, unpack
from sparse_serve.kernels import LinearSpec

TILE_BYTES = 8 << 20
"""Dense bytes unpacked at a time: about a last-level cache, so that the tile is multiplied while it is still near."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(spec: LinearSpec) -> str | None:
    """Only a dtype torch cannot multiply on every device is refused."""
    return None if spec.dtype in _DTYPES else f"dtype {spec.dtype} is not one of {list(_DTYPES)}"


def prepare(packed: PackedTensor) -> dict[str, Tensor]:
    """The stored form is the layout: values `[O, I*n/m]`, bitmask uint8 `[O, I/8]`, and of codes the scale."""
    stored = {"values": packed.values, "bitmask": packed.bitmask, "scale": packed.scale}
    return {name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None}


def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
    """`[..., I] -> [..., O]`."""
    y_TO: Tensor = reference_linear(x_TI, tensors["values"], tensors["bitmask"], tensors.get("scale"), bias_O)
    return y_TO


@torch.library.custom_op("sparse_serve::reference_linear", mutates_args=())
def reference_linear(
    x_TI: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    """The custom op behind `linear`: opaque to torch.compile, which sees only `_fake`.

    Codes become the float32 values they stand for, and those are rounded to x's dtype, as a dense model's would be.
    """
    out_features, in_features = bitmask.shape[0], bitmask.shape[1] * 8
    tile_rows = max(1, TILE_BYTES // (in_features * (values if scale is None else scale).element_size()))
    y_TO = x_TI.new_empty((*x_TI.shape[:-1], out_features))
    for start in range(0, out_features, tile_rows):
        stop = min(start + tile_rows, out_features)
        tile_scale = None if scale is None else scale[start:stop]
        tile_OI = unpack(values[start:stop], bitmask[start:stop], tile_scale).to(x_TI.dtype)
        tile_bias = None if bias_O is None else bias_O[start:stop]
        y_TO[..., start:stop] = dense_linear(x_TI, tile_OI, tile_bias)
    return y_TO


@reference_linear.register_fake
def _fake(x_TI: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty((*x_TI.shape[:-1], bitmask.shape[0]))
