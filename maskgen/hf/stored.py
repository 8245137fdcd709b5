"""Under which names a checkpoint stores the tensors of a model.

transformers renames tensors while it loads them (the decoder of a model that also sees is `language_model.model` in the
files and `model.language_model` in memory), and makes some from several (all experts of a layer become one tensor).
Checkpoints, masks and engines go by the names in the files, so everything this project writes or says does, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class Renamed:
    """What becomes of one stored tensor: `targets` are tensors of the model, made from this one and perhaps others.

    With `alone`, it is the model's only target, value by value.
    """

    targets: tuple[str, ...]
    alone: bool


def renamed(
    names: Iterable[str], conversions: Sequence[Any], base_prefix: str | None = None, expected: Any = None
) -> dict[str, Renamed]:
    """What transformers makes of the tensors called `names` under its own list of conversions.

    With `base_prefix` and the `expected` tensors of the model, a checkpoint without the task's head, or with one, is
    understood as well.
    """
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    found = {}
    for name in names:
        target, source = rename_source_key(name, renamings, converters, base_prefix, expected)
        found[name] = Renamed(_targets(target, source, converters), source is None)
    return found


def tensor_names(model: nn.Module, stored: Iterable[str]) -> dict[str, Renamed]:
    """What becomes of the tensors of a checkpoint when transformers loads them into `model`.

    A prefix that transformers adds or removes of itself is not, because engines do not.
    """
    return renamed(stored, get_model_conversion_mapping(model))


def shapes_of(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """The tensors of a model that was not read from files, as if each were stored under its own name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _targets(target: str, source: str | None, converters: Sequence[Any]) -> tuple[str, ...]:
    """Names of the model's tensors made from one stored tensor: several when the model splits a fused weight."""
    if source is None:
        return (target,)
    converter = next(converter for converter in converters if source in converter.source_patterns)
    first, *_ = converter.target_patterns
    return tuple(target.replace(first, pattern) for pattern in converter.target_patterns)


def numbers_as_stars(name: str) -> str:
    """`mlp.experts.3.w1` -> `mlp.experts.*.w1`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
