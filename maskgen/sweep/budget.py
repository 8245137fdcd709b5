"""Spends a budget: prunes everything, measures what the sparsity of each layer costs, chooses what stays dense.

What it has done is in the work directory, for this budget and for the next one:

    run.json, block-*.safetensors    every layer pruned: an ordinary sweep
    budget/costs.json                what each layer's sparsity costs (`sensitivity`)
    budget/DIGEST.json               how one budget is spent
    budget/DIGEST/                   the sweep that leaves its layers dense
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from maskgen.core.checkpoint import WEIGHT_SUFFIX, read_headers
from maskgen.core.digest import digest_json
from maskgen.core.errors import RecipeError
from maskgen.core.files import read_json, write_json
from maskgen.export.allocation import Allocation, LayerCost, load_allocation, share_of_bytes
from maskgen.hf import model
from maskgen.hf.fused import ServedLayer, served_layers
from maskgen.hf.planning import Plan, plan_of
from maskgen.hf.pruning_cost import HeldOutText
from maskgen.numerics.knapsack import knapsack
from maskgen.recipes.recipe import Recipe
from maskgen.recipes.sections import Budget
from maskgen.sweep.driver import Progress, run_digest, sweep
from maskgen.sweep.sensitivity import Probe, costs, mixture
from maskgen.sweep.workdir import WorkDir

FOLDER = "budget"
_COSTS_FILE = "costs.json"
_ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Measuring:
    """What a budget is spent on: the model in `model_dir`, pruned in `work` by the one-shot `recipe`, which has none.

    `windows_ST` are its calibration windows, the first `bos_tokens` of each being BOS. `prior` and `prior_digest` are
    those of `sweep.driver.sweep`.
    """

    recipe: Recipe
    budget: Budget
    model_dir: Path
    base_digest: str
    windows_ST: Tensor
    bos_tokens: int
    device: str
    work: Path
    prior: Callable[[str], Tensor] | None = None
    prior_digest: str | None = None

    @property
    def text(self) -> HeldOutText:
        """The windows on which costs are measured."""
        return HeldOutText(self.windows_ST[: self.budget.windows], self.bos_tokens, ["calibration"])

    @property
    def strict_digest(self) -> str:
        """The digest of the run that prunes everything."""
        return run_digest(self.recipe, self.base_digest, self.windows_ST, self.device, self.prior_digest)

    def plan(self, loaded: nn.Module) -> Plan:
        """Everything that the recipe prunes."""
        return plan_of(self.model_dir, self.recipe.pattern, self.recipe.ignore, loaded)


def layers_of(model_dir: Path, plan: Plan, recipe: Recipe) -> list[ServedLayer]:
    """The layers that `plan` prunes of the model in `model_dir`, those together that are served as one."""
    headers = read_headers(model_dir)
    names = [name for block in plan.targets for name in block]
    sizes = {name: _ITEMSIZE[headers[name + WEIGHT_SUFFIX].dtype] for name in names}
    return served_layers(plan.targets, plan.groups, recipe.pattern, sizes)


def check(budget: Budget, layers: Sequence[ServedLayer]) -> None:
    """`RecipeError` for a budget that cannot be met, whatever is pruned; it says the nearest that can."""
    least = sum(layer.sparse_bytes for layer in layers) / sum(layer.dense_bytes for layer in layers)
    if budget.bytes is not None and budget.bytes < least:
        raise RecipeError(
            f"budget.bytes {budget.bytes:g}: with every layer sparse, prunable weights take {least:.4f} of their dense "
            f"bytes; the nearest budget that can be met is {math.ceil(least * 1e4) / 1e4:g}"
        )


def folder_of(measuring: Measuring, allocation: Allocation) -> Path:
    """The work directory of the sweep that leaves the layers of `allocation` dense."""
    digest = digest_json({"run": measuring.strict_digest, "dense": sorted(allocation.dense)})
    return measuring.work / FOLDER / digest.removeprefix("sha256:")[:16]


def allocate(measuring: Measuring, progress: Callable[[Progress], None]) -> Allocation:
    """Spend the budget, or read how an earlier process did.

    Raises what a sweep does, and `RecipeError` for a budget that cannot be met.
    """
    budget = measuring.budget
    digest = digest_json({"run": measuring.strict_digest, "budget": budget.model_dump()})
    file = measuring.work / FOLDER / f"{digest.removeprefix('sha256:')[:16]}.json"
    if file.is_file():
        return load_allocation(file)
    swept = _strict(measuring, progress)
    gc.collect()
    loaded = model.load(measuring.model_dir)
    plan = measuring.plan(loaded)
    layers = layers_of(measuring.model_dir, plan, measuring.recipe)
    probe = Probe.of(loaded, plan, measuring.text, measuring.device)

    def sparse(name: str) -> Tensor:
        return swept.packed(name).unpack()

    cost_of = _costs(measuring, probe, sparse, progress)
    kept = _choose(budget, layers, [sum(cost_of[name] for name in layer.layers) for layer in layers])
    found = [
        LayerCost(
            layers=layer.layers,
            dense=is_dense,
            cost=sum(cost_of[name] for name in layer.layers),
            dense_bytes=layer.dense_bytes,
            sparse_bytes=layer.sparse_bytes,
        )
        for layer, is_dense in zip(layers, kept, strict=True)
    ]
    dense = {name for layer in found if layer.dense for name in layer.layers}
    allocation = Allocation(
        asked=budget.asked,
        bytes=share_of_bytes(found),
        strict_kl=_kl(probe, sparse, ()),
        kl=_kl(probe, sparse, dense),
        windows=len(measuring.text.ids_ST),
        window_tokens=measuring.windows_ST.shape[1],
        layers=tuple(found),
    )
    write_json(file, allocation.model_dump(mode="json"))
    return allocation


def _strict(measuring: Measuring, progress: Callable[[Progress], None]) -> WorkDir:
    """Prune every layer of a throw-away copy of the model."""
    loaded = model.load(measuring.model_dir)
    _, swept = sweep(
        loaded, measuring.plan(loaded), measuring.recipe, measuring.windows_ST, measuring.work, measuring.base_digest,
        measuring.device, progress, measuring.prior, measuring.prior_digest,
    )  # fmt: skip
    return swept


def _costs(
    measuring: Measuring, probe: Probe, sparse: Callable[[str], Tensor], progress: Callable[[Progress], None]
) -> Mapping[str, float]:
    """What the sparsity of each layer costs, by name; kept in the work directory, and continued if that was stopped."""
    file = measuring.work / FOLDER / _COSTS_FILE
    run = digest_json({"run": measuring.strict_digest, "windows": len(measuring.text.ids_ST)})
    stored = read_json(file) if file.is_file() else {}
    known: list[dict[str, float]] = stored["points"] if stored.get("run") == run else []
    costs(probe, sparse, known, progress, lambda: write_json(file, {"run": run, "points": known}))
    return {name: math.fsum(point[name] for point in known) for name in known[0]}


def _choose(budget: Budget, layers: Sequence[ServedLayer], cost: Sequence[float]) -> list[bool]:
    """Which layers stay dense: those that save most, within the budget."""
    assert budget.bytes is not None
    strict, dense = (sum(getattr(layer, kind) for layer in layers) for kind in ("sparse_bytes", "dense_bytes"))
    room = math.floor(budget.bytes * dense) - strict
    return knapsack(cost, [layer.dense_bytes - layer.sparse_bytes for layer in layers], room)


def _kl(probe: Probe, sparse: Callable[[str], Tensor], dense: Collection[str]) -> float:
    """KL divergence from the dense model, where all layers but these are sparse."""
    *_, outputs = probe.forward(mixture(probe, lambda name: float(name not in dense), sparse))
    divergence = probe.compare(outputs).divergence
    assert divergence is not None
    return divergence.kl
