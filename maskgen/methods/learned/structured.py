"""Structured baselines: rank the units of every layer once, remove the lowest, and optionally tune adapters afterwards.

What learned masks must beat at the same widths, with (`lora_rank` > 0) and without the same adapters. Two scores of a
unit, compared within a layer only, because every layer loses the same number:

    magnitude   the sum of squares of all weights that go with the unit: its columns at the site, its rows before it
    taylor      sum over batches of (m dL/dm)^2 at m = 1: what setting its mask to 0 does to the loss to first order

Scores are taken over the first `score_steps` steps, during which all masks are 1. The loss must not be distillation
only then: its gradient vanishes where student and teacher are the same.

Sources: Ma et al., "LLM-Pruner", NeurIPS 2023 (Taylor, grouped weights); Molchanov et al., CVPR 2019 (squared Taylor).
Deviation: uniform widths, so no scores are compared across layers and no layer is spared.

Legend: U = units of a layer, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.methods import Solution
from maskgen.methods.learned import Layers, LearnedLinear, LearnedMethod, Result, StepContext, TargetLayer
from maskgen.numerics.shards import full
from maskgen.numerics.unit_linear import UnitLinear, add_taylor, make_optimizer, sites
from maskgen.numerics.units import FEEDS, Budget, top_units


class StructuredLinear(UnitLinear, LearnedLinear):
    """A frozen layer with an adapter and, at a site, masks of ones and zeros."""

    def __init__(self, target: TargetLayer, rank: int, generator: torch.Generator) -> None:
        super().__init__(target)
        self.add_units(target.units, rank, generator)

    def solution(self) -> Solution:
        """The weight with masks and adapter merged in; the columns of removed units are zero."""
        return Solution(self.mask(), self.merged())


@dataclass(frozen=True)
class Structured(LearnedMethod):
    """Options as in `maskprune`; `score` is "taylor" or "magnitude"."""

    result: ClassVar[Result] = Result.SLICED

    score: str = "taylor"
    score_steps: int = 16
    keep_parameters: float = 0.75
    keep_kv_groups: int = 0
    keep_ffn: int = 0
    tensor_parallel: int = 1
    ffn_multiple: int = 64
    heads_divide_hidden: bool = True
    lora_rank: int = 0

    def __post_init__(self) -> None:
        Budget.of(self)
        self.require_one_of(score=("taylor", "magnitude"))
        if self.score_steps < 1:
            raise RecipeError(f"method.score_steps: {self.score_steps}, expected at least 1")

    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear:
        """Every linear layer of the blocks, so that all of them can be sliced."""
        return StructuredLinear(target, self.lora_rank, generator)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Adam on the adapters and `others`; in the scoring steps the masks' gradients are added to the scores."""
        targets = cast(Mapping[str, StructuredLinear], layers)

        def on_gradients() -> None:
            if next(iter(targets.values())).context.step < self.score_steps:
                add_taylor(targets)

        return make_optimizer(targets, others, lr, Budget.of(self), on_gradients)

    def after_step(self, layers: Layers, context: StepContext, lr: float) -> None:
        """At the end of the last scoring step (or of the run, if that is shorter), remove the lowest."""
        if context.step + 1 != min(self.score_steps, context.steps):
            return
        targets = cast(Mapping[str, UnitLinear], layers)
        for name, layer in sites(targets).items():
            if self.score == "magnitude":
                layer.importance_U.copy_(magnitude(name, targets))
            elif not layer.importance_U.any():
                raise NumericalError(f"{name}: masks have no gradient; lower train.distill_weight below 1")
            layer.set_masks(top_units(layer.importance_U, int(layer.keep)).float())

    def kept_units(self, layers: Layers) -> Mapping[str, Tensor]:
        """The units whose mask is 1, as many in every layer."""
        return {name: layer.kept_U() for name, layer in sites(cast(Mapping[str, UnitLinear], layers)).items()}


def magnitude(site: str, layers: Mapping[str, UnitLinear]) -> Tensor:
    """Sum of squares of the weights that go with each unit of a site, float32 `[U]`."""
    parent, _, kind = site.rpartition(".")
    count = layers[site].units
    total_U = full(layers[site].weight.detach()).float().square().sum(0).unflatten(0, (count, -1)).sum(1)
    for leaf in FEEDS[kind]:
        rows_U = full(layers[f"{parent}.{leaf}"].weight.detach()).float().square().sum(1).unflatten(0, (count, -1))
        total_U += rows_U.sum(1)
    return total_U


METHOD = Structured
