"""Kept values as signed 4-bit integers, with a float32 scale for each group of consecutive kept values of a row.

    byte     code of value 2k in bits 0 to 3, of value 2k + 1 in bits 4 to 7; two's complement, -8 to 7
    groups   of 64 or 128 kept values, the last of a row perhaps shorter; or the whole row
    weight   float32(code) * scale of its group

Sixteen steps are few, so a scale that just reaches the largest value is not the best one: what little is clipped by a
smaller one is outweighed by finer steps for all others. `fit_scales` tries some and keeps the one with the smallest
squared error, weighted if the inputs of the layer are known.

Legend: O = out features, V = kept values per row, S = groups of a row, G = values of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskgen.core.errors import FormatError

LOWEST, HIGHEST = -8, 7
GROUPS: tuple[int | None, ...] = (64, 128, None)
"""Kept values that share a scale; None: all of a row."""

PER_BYTE = 2

_SHRINKS = [1.0 - 0.025 * step for step in range(20)]
"""Scales that are tried, relative to the one that reaches the largest magnitude with 7."""

_ELEMENTS_AT_A_TIME = 1 << 20


def pack_nibbles(codes_OV: Tensor) -> Tensor:
    """Codes int8 `[O, V]`, -8 to 7 and V even, to uint8 `[O, V/2]`."""
    low_OH, high_OH = codes_OV.view(torch.uint8)[:, ::2], codes_OV.view(torch.uint8)[:, 1::2]
    return (low_OH & 15) | (high_OH << 4)


def unpack_nibbles(octets_OH: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    both_OH2 = torch.stack([octets_OH & 15, octets_OH >> 4], dim=-1)
    codes_OV = both_OH2.flatten(-2).view(torch.int8)
    return (codes_OV ^ 8) - 8  # bit 3 is the sign


def groups_of(kept: int, group: int | None) -> int:
    """S: how many scales a row of `kept` values has."""
    return 1 if group is None else -(-kept // group)


def scale_shape(rows: int, kept: int, group: int | None) -> list[int]:
    """Of the scales of a weight: `[O, S]`, and `[O]` for one a row, as other codes have them."""
    return [rows] if group is None else [rows, groups_of(kept, group)]


def group_of(kept: int, scale_shape: list[int], name: str = "weight") -> int | None:
    """The group that scales of this shape are for. A row that is no longer than 64 is one group of 64.

    Raises `FormatError` where they fit none.
    """
    if len(scale_shape) == 1:
        return None
    for group in GROUPS:
        if group is not None and len(scale_shape) == 2 and scale_shape[1] == groups_of(kept, group):
            return group
    raise FormatError(
        f"{name}: scale {scale_shape} for {kept} kept values a row, expected one scale a row, or one for each 64 or 128"
    )


def spread(scale: Tensor, kept: int) -> Tensor:
    """Scales `[O]` or `[O, S]` -> the scale of every value, `[O, V]`."""
    if scale.ndim == 1:
        return scale[:, None].expand(-1, kept)
    group = group_of(kept, list(scale.shape))
    assert group is not None
    return scale.repeat_interleave(group, dim=1)[:, :kept]


def to_int4(values_OV: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Octets uint8 `[O, V/2]` and scales float32 of float values: each value to the nearest code.

    `FormatError` for an odd number of values.
    """
    check_even(values_OV.shape[1])
    scale = fit_scales(values_OV.float(), group)
    codes_OV = nearest(values_OV.float(), spread(scale, values_OV.shape[1]))
    return pack_nibbles(codes_OV.to(torch.int8)), scale


def check_even(kept: int, name: str = "weight") -> None:
    """`FormatError` for a row whose codes do not fill whole bytes."""
    if kept % PER_BYTE:
        raise FormatError(
            f"{name}: {kept} kept values a row, expected an even number, as two int4 codes share a byte; "
            "leave the layer out with `ignore`, or choose other values"
        )


def nearest(values: Tensor, scale: Tensor) -> Tensor:
    """The code nearest to each value, as a float; ties to even."""
    return (values / scale).round_().clamp_(LOWEST, HIGHEST)


def fit_scales(values_OV: Tensor, group: int | None, importance_OV: Tensor | None = None) -> Tensor:
    """The scale of each group with the least (weighted) squared error of those tried: float32 `[O, S]` or `[O]`.

    A group of zeros gets 1.
    """
    rows, kept = values_OV.shape
    size = kept if group is None else group
    missing = groups_of(kept, group) * size - kept
    step = max(1, _ELEMENTS_AT_A_TIME // kept)
    found = []
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        values_OSG = pad(values_OV[chunk].float(), (0, missing)).unflatten(1, (-1, size))
        weights_OSG = 1.0 if importance_OV is None else pad(importance_OV[chunk], (0, missing)).unflatten(1, (-1, size))
        found.append(_fit(values_OSG, weights_OSG))
    scale_OS = torch.cat(found)
    return scale_OS[:, 0].contiguous() if group is None else scale_OS


def _fit(values_OSG: Tensor, weights_OSG: Tensor | float) -> Tensor:
    largest_OS1 = values_OSG.abs().amax(-1, keepdim=True)
    limits = torch.finfo(torch.float32)
    top_OS1 = (largest_OS1 / HIGHEST).clamp(limits.tiny, limits.max / 16)
    best_OS1, least_OS1 = top_OS1, torch.full_like(top_OS1, torch.inf)
    for shrink in _SHRINKS:
        scale_OS1 = (top_OS1 * shrink).clamp_min(limits.tiny)
        codes_OSG = nearest(values_OSG, scale_OS1)
        weighted_OSG = codes_OSG * weights_OSG
        slope_OS1 = (weighted_OSG * codes_OSG).sum(-1, keepdim=True)
        # the best scale for these codes, by least squares
        fitted_OS1 = (weighted_OSG * values_OSG).sum(-1, keepdim=True) / slope_OS1
        fitted_OS1 = fitted_OS1.where(fitted_OS1.isfinite() & (fitted_OS1 > 0), scale_OS1)
        fitted_OS1 = fitted_OS1.clamp(limits.tiny, limits.max / 16)
        error_OSG = nearest(values_OSG, fitted_OS1) * fitted_OS1 - values_OSG
        error_OS1 = (error_OSG.square_() * weights_OSG).sum(-1, keepdim=True)
        is_better_OS1 = error_OS1 < least_OS1
        best_OS1, least_OS1 = fitted_OS1.where(is_better_OS1, best_OS1), error_OS1.where(is_better_OS1, least_OS1)
    return best_OS1.where(largest_OS1 > 0, 1.0)[..., 0]
