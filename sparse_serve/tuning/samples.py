"""Random weights and inputs of a layer's shape, to measure kernels with.

They come from generators of their own with fixed seeds: measuring must not change what is sampled in the process that
measures, and two measurements of a layer use the same numbers. A weight repeats `TILE_ROWS` random rows, so that large
layers are made quickly and an answer can be checked against the product of those few rows.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.values import FLOAT
from sparse_serve.kernels import LinearSpec

TILE_ROWS = 64
"""Different rows of a weight; a layer has them again and again."""

_X, _WEIGHT, _MASK = range(3)
"""Seeds. They differ because inputs equal to a row of the weight would give outputs unlike those of a layer."""


def random_input(spec: LinearSpec, tokens: int) -> Tensor:
    """Activations `[T, I]` in the layer's dtype, normally distributed."""
    return _random(spec, _X, tokens, spec.in_features).to(spec.dtype)


def random_weight(spec: LinearSpec) -> PackedTensor:
    """A sparse weight `[O, I]`, its values stored as `spec.values` says.

    With float32 activations the values are full float32 numbers. Those of a 16-bit checkpoint have fewer digits, which
    a kernel may use to store less; it is then faster than measured, never slower.
    """
    rows = _tile_rows(spec)
    weight = _random(spec, _WEIGHT, rows, spec.in_features).mul_(spec.in_features**-0.5)
    kept = spec.pattern.mask_from_scores(_random(spec, _MASK, rows, spec.in_features))
    dtype = spec.dtype if spec.values == FLOAT else torch.float32
    tile = PackedTensor.pack(weight.to(dtype), kept, spec.pattern).quantised(spec.values, spec.group)
    scale = None if tile.scale is None else _repeated(tile.scale, spec)
    return PackedTensor(_repeated(tile.values, spec), _repeated(tile.bitmask, spec), spec.pattern, scale)


def random_dense_weight(spec: LinearSpec) -> Tensor:
    """A dense weight `[O, I]` in the layer's dtype."""
    return _repeated(_random(spec, _WEIGHT, _tile_rows(spec), spec.in_features).to(spec.dtype), spec)


def dense_tile(spec: LinearSpec, packed: PackedTensor) -> Tensor:
    """The rows that a `random_weight` repeats, dense in float32: `[TILE_ROWS or fewer, I]`."""
    rows = _tile_rows(spec)
    scale = None if packed.scale is None else packed.scale[:rows]
    return PackedTensor(packed.values[:rows], packed.bitmask[:rows], packed.pattern, scale).unpack().float()


def _tile_rows(spec: LinearSpec) -> int:
    return min(spec.out_features, TILE_ROWS)


def _repeated(rows: Tensor, spec: LinearSpec) -> Tensor:
    times = -(-spec.out_features // len(rows))
    return rows.repeat(times, *(1 for _ in rows.shape[1:]))[: spec.out_features]


def _random(spec: LinearSpec, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator(spec.device_type).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=spec.device_type, dtype=torch.float32)
