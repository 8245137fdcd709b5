"""Units of structured pruning, which are key-value groups and hidden neurons; every layer keeps the same number.

A *site* is a linear layer whose input falls into units: equal runs of columns. An attention output has one unit per
key-value group (with all query heads that share its key and value), so the ratio of query to key-value heads never
changes; an FFN output has one per hidden neuron. Removing a unit removes its columns of the site and the rows
of the layers that feed it, which stand beside the site in its parent module:

    o_proj     columns of the group    q_proj rows of its query heads, k_proj and v_proj rows of its one head
    down_proj  one column              one row of gate_proj and of up_proj

so the parameters left are linear in what is kept, R(keep) = 1 - sum_kind layers * cost * (units - keep) / all of them.

Legend: U = units of a site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from maskgen.core.errors import ModelError, RecipeError

HEADS, NEURONS = "o_proj", "down_proj"
"""The two kinds of sites, by the last part of their names."""

FEEDS = {HEADS: ("q_proj", "k_proj", "v_proj"), NEURONS: ("gate_proj", "up_proj")}
"""UnitKind of site -> the layers beside it that lose rows when it loses columns."""

MIN_COLUMNS_PER_RANK = 16
"""The FFN columns of each tensor-parallel rank are a multiple of this, which GPU kernels need to be fast."""


class LinearShape(NamedTuple):
    """Sizes of a linear layer, and whether it has a bias."""

    out_features: int
    in_features: int
    biased: bool

    @property
    def parameters(self) -> int:
        """Number of parameters, weight and bias."""
        return self.out_features * (self.in_features + self.biased)


@dataclass(frozen=True)
class UnitKind:
    """All sites of one kind: there are `layers` of them with `units` units each.

    Removing a unit from one layer removes `cost` parameters. `heads_per_unit` is the number of query heads of a
    key-value group, and 1 for neurons. `hidden` is the number of output features of the site.
    """

    units: int
    layers: int
    cost: int
    heads_per_unit: int
    hidden: int


@dataclass(frozen=True)
class ParameterCount:
    """Number of `parameters` of the linear layers of all blocks, and the units that can be removed, by kind."""

    parameters: int
    kinds: Mapping[str, UnitKind]

    def fraction(self, keep: Mapping[str, float]) -> float:
        """R: the fraction of the parameters left when `keep[kind]` units stay in every layer."""
        return 1 - sum(k.layers * k.cost * (k.units - keep[name]) for name, k in self.kinds.items()) / self.parameters


@dataclass(frozen=True)
class Budget:
    """How small a model is to become.

    `keep_parameters` is the fraction of parameters to keep. `keep_kv_groups` and `keep_ffn` are explicit widths, 0 to
    derive them from the fraction. Widths must suit `tensor_parallel` ranks, FFN widths be multiples of `ffn_multiple`,
    and with `heads_divide_hidden` the number of heads must divide the hidden size.
    """

    keep_parameters: float
    keep_kv_groups: int
    keep_ffn: int
    tensor_parallel: int
    ffn_multiple: int
    heads_divide_hidden: bool

    @classmethod
    def of(cls, options: object) -> Budget:
        """The budget in the options of a method, whose fields have the same names."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        if not 0 < self.keep_parameters < 1:
            raise RecipeError(f"method.keep_parameters: {self.keep_parameters}, expected a fraction between 0 and 1")
        for name in ("keep_kv_groups", "keep_ffn"):
            if getattr(self, name) < 0:
                raise RecipeError(f"method.{name}: {getattr(self, name)}, expected a count, or 0 to work it out")
        for name in ("tensor_parallel", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise RecipeError(f"method.{name}: {getattr(self, name)}, expected at least 1")


def kind_of(site: str) -> str:
    """The kind of a site, which is the last part of its module name."""
    return site.rpartition(".")[2]


def count_parameters(shapes: Mapping[str, LinearShape], units: Mapping[str, int]) -> ParameterCount:
    """Count the parameters of the linear layers of all blocks.

    `shapes` maps module names to layers, `units` the names of the sites to their number of units. Raises `ModelError`
    when layers of one kind differ or a layer that feeds a site is missing.
    """
    variants_of: dict[str, set[UnitKind]] = {}
    for site, count in units.items():
        parent, _, kind = site.rpartition(".")
        feeds = [shapes.get(f"{parent}.{leaf}") for leaf in FEEDS[kind]]
        if None in feeds:
            raise ModelError(
                f"{site}: one of {FEEDS[kind]} beside it is not pruned with it; do not `ignore` any of them, and "
                "start from a model whose widths are multiples of 8"
            )
        rows = [feed for feed in feeds if feed is not None]
        cost = shapes[site].out_features * shapes[site].in_features + sum(row.parameters for row in rows)
        heads = rows[0].out_features // rows[1].out_features
        layers = sum(kind_of(name) == kind for name in units)
        variants_of.setdefault(kind, set()).add(
            UnitKind(count, layers, cost // count, heads, shapes[site].out_features)
        )
    for kind, variants in variants_of.items():
        if len(variants) > 1:
            raise ModelError(
                f"layers of kind {kind} differ ({sorted(map(str, variants))}); uniform widths need equal ones"
            )
    return ParameterCount(
        sum(shape.parameters for shape in shapes.values()), {k: v.pop() for k, v in variants_of.items()}
    )


def resolve_widths(counted: ParameterCount, budget: Budget, kv_groups: float | None = None) -> dict[str, int]:
    """How many units to keep in every layer, by kind, so that the budget is met and an engine can serve the widths.

    The number of key-value groups is `kv_groups` (by default the fraction `budget.keep_parameters` of them), rounded up
    to a number that can be split over ranks; the FFN width follows from the rest of the budget, rounded down, so the
    model is never larger than asked for. Raises `RecipeError` if no such widths exist.
    """
    keep = {}
    if (heads := counted.kinds.get(HEADS)) is not None:
        keep[HEADS] = _keep_heads(
            heads, budget, budget.keep_parameters * heads.units if kv_groups is None else kv_groups
        )
    elif budget.keep_kv_groups:
        raise RecipeError("method.keep_kv_groups: heads of this architecture cannot be removed; leave it at 0")
    if (neurons := counted.kinds.get(NEURONS)) is None:
        raise ModelError(
            f"no {NEURONS} of this model is pruned, so there are no neurons to remove; do not `ignore` it, and start "
            "from a model whose widths are multiples of 8"
        )
    step = math.lcm(budget.ffn_multiple, MIN_COLUMNS_PER_RANK * budget.tensor_parallel)
    if budget.keep_ffn:
        keep[NEURONS] = budget.keep_ffn
        if budget.keep_ffn > neurons.units or (budget.keep_ffn % step and budget.keep_ffn != neurons.units):
            raise RecipeError(
                f"method.keep_ffn: {budget.keep_ffn}, expected at most {neurons.units} and a multiple of {step} "
                "(ffn_multiple, and 16 on each rank)"
            )
        return keep
    spare = counted.fraction({**keep, NEURONS: neurons.units}) - budget.keep_parameters
    most = neurons.units - max(0.0, spare) * counted.parameters / (neurons.layers * neurons.cost)
    keep[NEURONS] = neurons.units if spare <= 0 else math.floor(most + 1e-6) // step * step
    if keep[NEURONS] < step:
        raise RecipeError(
            f"method.keep_parameters: {budget.keep_parameters} leaves an FFN width of {most:.1f} beside {keep}, less "
            f"than one multiple of {step}; keep more, or set keep_kv_groups or a smaller ffn_multiple"
        )
    return keep


def _keep_heads(heads: UnitKind, budget: Budget, least_groups: float) -> int:
    """The smallest number of key-value groups from `least_groups` on that an engine can serve."""

    def servable(groups: int) -> bool:
        queries, ranks = groups * heads.heads_per_unit, budget.tensor_parallel
        divides = not budget.heads_divide_hidden or heads.hidden % queries == 0
        return groups == heads.units or (
            divides and queries % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)
        )

    allowed = [groups for groups in range(1, heads.units + 1) if servable(groups)]
    if budget.keep_kv_groups:
        if budget.keep_kv_groups not in allowed:
            raise RecipeError(
                f"method.keep_kv_groups: {budget.keep_kv_groups}, expected one of {allowed} (split over "
                f"{budget.tensor_parallel} ranks; heads_divide_hidden={budget.heads_divide_hidden})"
            )
        return budget.keep_kv_groups
    return next(groups for groups in allowed if groups >= least_groups - 1e-6)


def top_units(score_U: Tensor, keep: int) -> Tensor:
    """Bool `[U]`, True for the `keep` units with the highest scores; of equal ones the first are taken."""
    kept_U = torch.zeros_like(score_U, dtype=torch.bool)
    kept_U[score_U.sort(descending=True, stable=True).indices[:keep]] = True
    return kept_U
