"""Pruning methods: the base classes of all of them and of the one-shot ones, and how a recipe's method is built.

There is one method per file, in `oneshot/` if it prunes one layer after the other, in `blockwise/` if it trains one
decoder block after the other, and in `learned/` if it trains the whole model; the file name is the method's name in a
recipe, and the file exports its class as `METHOD`. A method works on tensors only: it imports `maskgen.methods`,
`maskgen.numerics`, `maskgen.core`, torch, numpy and the standard library, never another method. It does not load, move,
save, print or parse anything.

A one-shot method gets a layer's float32 weight and what it wanted to know of the layer's inputs from
`maskgen.sweep.driver`, on whatever device they are, and returns a `Solution`. The options of a method are the fields of
its (frozen) dataclass: they are checked when the recipe is read, and are part of the recipe's digest, which is written
into every result.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import maskgen.methods
from maskgen.core import registry
from maskgen.core.correction import CorrectionConfig
from maskgen.core.errors import RecipeError
from maskgen.core.packed import Correction as Correction  # part of a Solution
from maskgen.core.pattern import NMPattern
from maskgen.numerics.statistics import Gram, add_drift, add_gram


@dataclass(frozen=True)
class Solution:
    """What a method returns for one layer.

    `mask` is bool `[O, I]`, True where a weight is kept. `weight` `[O, I]` holds the new weights if the method changed
    them, else None. `correction` is a small dense term to add to the layer's output, or None; a `LocalMethod` makes it
    once the weight is stored (`LocalMethod.correct`).
    """

    mask: Tensor
    weight: Tensor | None = None
    correction: Correction | None = None


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are the options."""

    @property
    def uses_prior(self) -> bool:
        """Whether layers need a mask to start from, with these options."""
        return False

    @property
    def correction(self) -> CorrectionConfig | None:
        """The form of the correction that every layer of the result has, with these options; None without one."""
        return None

    def check_pattern(self, pattern: NMPattern) -> None:
        """Raise `RecipeError` if `pattern` cannot be had with these options. Called when a recipe is read."""

    def require_positive(self, *names: str) -> None:
        """Raise `RecipeError` unless each of these options is a number above 0 and below infinity."""
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"method.{name} {getattr(self, name)}: expected a positive number below infinity")

    def require_not_negative(self, *names: str, most: float = math.inf) -> None:
        """Raise `RecipeError` unless each of these options is a number from 0 to `most`, and below infinity."""
        for name in names:
            if not 0 <= getattr(self, name) <= most or getattr(self, name) == math.inf:
                raise RecipeError(f"method.{name} {getattr(self, name)}: expected a number from 0 to {most}")

    def require_one_of(self, **known: Collection[str]) -> None:
        """Raise `RecipeError` unless each option, given by name, has one of its known values."""
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise RecipeError(f"method.{name} {getattr(self, name)!r}: expected one of {sorted(values)}")


@dataclass(frozen=True)
class Drift:
    """How far a pruned model has moved from the dense one at a layer, for the tokens of one batch.

    `input_TI` is what must be added to the inputs of the layer to have those of the dense model. `stream_TO`, for a
    layer whose output is added to the residual stream, is what must be added to that stream in front of the layer; None
    for every other layer.
    """

    input_TI: Tensor
    stream_TO: Tensor | None = None


@dataclass(frozen=True)
class LayerMethod(Method):
    """Base of the methods that solve one layer after the other, from what was seen of its inputs."""

    @property
    def is_asymmetric(self) -> bool:
        """Whether the method is to see what layers receive in the dense model, too, with these options.

        The layers of a block are then solved in the order in which they are reached, each for the inputs that it gets
        when all before it are served as they will be.
        """
        return False

    def observe(self, stats: Any, x_TI: Tensor) -> Any:
        """Add a batch of a layer's float32 inputs `[T, I]` to its statistics and return them.

        `stats` is whatever the last call returned, None in the first, and may be updated in place. Layers that receive
        the same tensor share one `stats`.
        """
        return stats

    def observe_drift(self, stats: Any, x_TI: Tensor, drift: Drift) -> Any:
        """Of a batch that `observe` was just called with: add how far it is from the dense model. Only for methods with
        `is_asymmetric`.

        It is left out for layers that do not see every token (the experts of a mixture), as these may get others.
        """
        return stats


@dataclass(frozen=True)
class LocalMethod(LayerMethod, ABC):
    """Base of the one-shot methods, which prune one layer after the other.

    `needs_data` says whether the method looks at the inputs of layers; if not, no calibration text is read and no
    forward pass is run.
    """

    needs_data: ClassVar[bool] = True

    keeps_gram: ClassVar[bool] = False
    """Whether the statistics are a `maskgen.numerics.statistics.Gram`: then codes can be chosen for the outputs."""

    def correct(self, weight_OI: Tensor, served_OI: Tensor, stats: Any) -> Correction:
        """The float32 correction of one layer that was solved. Only for methods with a `correction`.

        `weight_OI` is its dense weight, `served_OI` the one that is served (zero where pruned, codes as the floats they
        stand for), both in float32; `stats` is what `observe` returned last. No argument may be changed. Raises
        `NumericalError` when the statistics cannot be used.
        """
        raise NotImplementedError

    @abstractmethod
    def solve(self, weight_OI: Tensor, stats: Any, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """Prune one layer: choose which entries of its float32 weight `[O, I]` stay, and perhaps change these.

        `stats` is what `observe` returned last. `prior_OI` is a bool mask `[O, I]` that follows the pattern for methods
        with `uses_prior`, and None for all others. No argument may be changed. Raises `NumericalError` when the
        statistics cannot be used.
        """


class ScoreMethod(LocalMethod):
    """A one-shot method that gives every weight a score and keeps the weights with the highest scores of each group.

    The score of a weight does not depend on its group, so `maskgen.sweep.permute` can use it to choose the groups.
    """

    @abstractmethod
    def score(self, weight_OI: Tensor, stats: Any) -> Tensor:
        """The score of each entry of a float32 weight, `[O, I]`, not negative. No argument may be changed."""

    def solve(self, weight_OI: Tensor, stats: Any, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        """The mask of the highest scores; weights stay as they are."""
        return Solution(pattern.mask_from_scores(self.score(weight_OI, stats)))


class AimedMethod(LocalMethod):
    """A one-shot method that knows the Gram matrix of the inputs, and may aim at what the dense model puts out.

    Two of its options are `mask`, "prior" to start from given masks, and `asymmetric`.
    """

    mask: str
    asymmetric: bool

    keeps_gram = True

    @property
    def uses_prior(self) -> bool:
        """Whether `mask` is "prior"."""
        return self.mask == "prior"

    @property
    def is_asymmetric(self) -> bool:
        """Whether `asymmetric` is set."""
        return self.asymmetric

    def observe(self, stats: Gram | None, x_TI: Tensor) -> Gram:
        """`stats` is the Gram matrix of the inputs, updated in place."""
        return add_gram(stats, x_TI)

    def observe_drift(self, stats: Gram, x_TI: Tensor, drift: Drift) -> Gram:
        """Its sums for the drift are updated in place, too."""
        add_drift(stats, x_TI, drift.input_TI, drift.stream_TO)
        return stats


def create(name: str, options: Mapping[str, Any]) -> Method:
    """Build the method called `name` with `options`, as a recipe states them.

    Whole numbers are accepted where a float is expected; nothing else is converted. Raises `RecipeError` for a name or
    an option that does not exist, listing those that do, and for a value of the wrong type or out of range.
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
