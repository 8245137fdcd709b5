"""How long layers take, dense and sparse, by the times that `sparse-serve tune` keeps on a machine.

One file for each layer, of which this is read:

    {"layer": {"out_features": 960, "in_features": 576, "pattern": "2:4", "dtype": "torch.bfloat16", "values": "float"},
     "seconds": {"1": {"dense": 2.1e-05, "cpu": 1.2e-05}, ...}}

`seconds` are those of one call, by number of tokens and by kernel. The time of a sparse layer is that of the fastest
kernel for one token, which is what decoding for one client asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskgen.core.errors import FormatError, RecipeError, clip
from maskgen.core.files import read_json
from maskgen.core.pattern import NMPattern
from maskgen.hf.fused import ServedLayer

_DENSE, _ONE_TOKEN = "dense", "1"

Times = tuple[int, int]
"""Nanoseconds of one token through a layer: dense, sparse."""


def times_of(folder: Path, layers: Sequence[ServedLayer], pattern: NMPattern, dtype: str) -> list[Times]:
    """The times of each of `layers`, stored as `dtype` ("bfloat16"), by the files in `folder`; the newest file counts.

    Raises `FormatError` for a folder that is none or a file that is damaged, `RecipeError` for a layer without times.
    """
    if not folder.is_dir():
        raise FormatError(
            f"`kernel_table` {folder}: no such directory; expected the one where sparse-serve keeps times"
        )
    known: dict[tuple[Any, ...], Times] = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
        value = read_json(file)
        layer, seconds = value.get("layer"), value.get("seconds")
        if not isinstance(layer, dict) or not isinstance(seconds, dict):
            raise FormatError(f"{file}: no times of a layer, expected an object with layer and seconds; delete it")
        if layer.get("values") == "float" and isinstance(seconds.get(_ONE_TOKEN), dict):
            key = tuple(layer.get(name) for name in ("out_features", "in_features", "pattern", "dtype"))
            known[key] = _times(file, seconds[_ONE_TOKEN])
    found = []
    for one in layers:
        times = known.get((one.out_features, one.in_features, str(pattern), f"torch.{dtype}"))
        if times is None:
            raise RecipeError(
                f"budget.speedup: {folder} has no times of a layer {one.out_features} x {one.in_features}, {pattern}, "
                f"{dtype} ({one.name}); prune this model without a budget and run `sparse-serve tune` on the result"
            )
        found.append(times)
    return found


def speedup_of(times: Sequence[Times], kept: Sequence[bool]) -> float:
    """How much faster one token gets through all layers, with those `kept` dense, than with all of them dense."""
    taken = sum(dense if is_dense else sparse for (dense, sparse), is_dense in zip(times, kept, strict=True))
    return sum(dense for dense, _ in times) / taken


def _times(file: Path, seconds: Mapping[str, Any]) -> Times:
    values = list(seconds.values())
    if not all(type(value) is float and math.isfinite(value) and value > 0 for value in values):
        raise FormatError(f"{file}: seconds {clip(dict(seconds))}, expected numbers above 0; delete it")
    kernels = [value for name, value in seconds.items() if name != _DENSE]
    if _DENSE not in seconds or not kernels:
        raise FormatError(f"{file}: seconds {clip(dict(seconds))}, expected those of dense and of a kernel; delete it")
    return max(1, round(seconds[_DENSE] * 1e9)), max(1, round(min(kernels) * 1e9))
