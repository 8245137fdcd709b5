"""Pruning methods, and what a layer-local one is: it watches a linear layer's inputs, then solves that layer.

One method per file, in `oneshot/` if it solves a layer at a time and in `learned/` if it trains; the file name is the
method's name in a recipe, and it exports `METHOD`. A method sees tensors: it imports `maskgen.methods`,
`maskgen.numerics`, `maskgen.core`, torch and the standard library, never a sibling.

A method scores or solves. It never loads, moves, saves, prints or parses: `maskgen.sweep.driver` hands it float32
tensors on whatever device they live on and takes a `Solution` back. Its options are the fields of its (frozen)
dataclass, so they exist once, are validated when the recipe is read, and are written into every artefact through the
recipe's digest.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import maskgen.methods
from maskgen.core import registry
from maskgen.core.errors import RecipeError
from maskgen.core.packed import Correction as Correction  # part of a Solution
from maskgen.core.pattern import NMPattern


@dataclass(frozen=True)
class Solution:
    """The answer for one layer: a bool mask `[O, I]` (True = kept), and new weights if the method changed them."""

    mask: Tensor
    weight: Tensor | None = None
    correction: Correction | None = None


@dataclass(frozen=True)
class Method:
    """What every method is: a frozen dataclass of options. See `LocalMethod` and `learned.LearnedMethod`."""

    def check_pattern(self, pattern: NMPattern) -> None:
        """Raise `RecipeError` if these options do not go with `pattern`; asked when the recipe is read."""


@dataclass(frozen=True)
class LocalMethod(Method, ABC):
    """Base of the one-shot methods. `needs_data=False` lets the driver skip every forward pass."""

    needs_data: ClassVar[bool] = True

    @property
    def uses_prior(self) -> bool:
        """Whether these options ask the driver for a mask to start from."""
        return False

    def observe(self, stats: Any, x_TI: Tensor) -> Any:
        """Fold float32 calibration inputs `[T, I]` into `stats` (None at first) and return the new `stats`.

        `stats` may be updated in place. Layers that are fed the same tensor share one `stats`.
        """
        return stats

    @abstractmethod
    def solve(self, weight_OI: Tensor, stats: Any, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """Choose what stays of a float32 weight `[O, I]`. None of the tensors may be changed.

        `prior_OI` is a legal bool mask `[O, I]` for methods with `uses_prior`, and None for all others.
        Raises `NumericalError` when the layer's statistics cannot be used.
        """


class ScoreMethod(LocalMethod):
    """A method that gives every entry a score of its own and keeps the largest of each group.

    Since a score does not depend on the groups, `maskgen.sweep.permute` can use it to choose what stands in them.
    """

    @abstractmethod
    def score(self, weight_OI: Tensor, stats: Any) -> Tensor:
        """What each entry of a float32 weight is worth, `[O, I]`, from 0 on. Nothing may be changed."""

    def solve(self, weight_OI: Tensor, stats: Any, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """Mask by score; no weight is changed."""
        return Solution(pattern.mask_from_scores(self.score(weight_OI, stats)))


def create(name: str, options: Mapping[str, Any]) -> Method:
    """Build the method `name` from recipe options; `RecipeError` lists what is known.

    Whole numbers are accepted where a float is expected; nothing else is converted.
    """
    method = registry.load(maskgen.methods, name, RecipeError).METHOD
    fields = {field.name: field for field in dataclasses.fields(method)}
    values = {}
    for key, value in options.items():
        if key not in fields:
            known = sorted(fields) or "none"
            raise RecipeError(f"method.{key}: {name} has no such option; its options are: {known}")
        values[key] = _typed(f"method.{key}", value, type(fields[key].default))
    result: Method = method(**values)
    return result


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise RecipeError(f"{name}: {value!r} is a {type(value).__name__}, expected a {kind.__name__}")
    return value
