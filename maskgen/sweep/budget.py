"""Spends a budget: prunes everything, measures what the sparsity of each layer costs, chooses what stays dense.

What it has done is in the work directory, for this budget and for the next one:

    run.json, block-*.safetensors    every layer pruned: an ordinary sweep, symmetric
    budget/costs-*.json              what each layer's sparsity costs (`sensitivity`)
    budget/looks-*.json              how high the perplexity was with some layers dense (`search`)
    budget/spent-*.json              how one budget is spent
    budget/sweep-*/                  the sweep that leaves its layers dense
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskgen.core.checkpoint import WEIGHT_SUFFIX, read_headers
from maskgen.core.digest import digest_json
from maskgen.core.errors import RecipeError
from maskgen.core.files import read_json, write_json
from maskgen.core.layout import LayerForm
from maskgen.data.tokens import digest_tokens
from maskgen.export.allocation import Allocation, LayerCost, Look, load_allocation
from maskgen.hf import blocks, model
from maskgen.hf.evaluate import Measured
from maskgen.hf.fused import ServedLayer, served_layers
from maskgen.hf.planning import Plan, plan_of
from maskgen.hf.pruning_cost import HeldOutText
from maskgen.numerics.memory import peak_rss_bytes
from maskgen.recipes.recipe import Recipe
from maskgen.recipes.sections import Budget
from maskgen.sweep.driver import sweep
from maskgen.sweep.kernel_times import Times, speedup_of
from maskgen.sweep.report import Progress
from maskgen.sweep.search import LOOKS, names_of, share_of, within_bytes, within_increase, within_time
from maskgen.sweep.sensitivity import Probe, Weights, costs, mixture
from maskgen.sweep.workdir import WorkDir, run_digest

FOLDER = "budget"
_ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Measuring:
    """What a budget is spent on: the model in `model_dir`, pruned in `work` by the one-shot `recipe`, which has none.

    `form` is what is stored of each sparse layer of the result, whose bytes count; its correction may be that of a
    method which trains what `recipe` makes.
    `windows_ST` are its calibration windows, the first `bos_tokens` of each being BOS. `prior` and `prior_digest` are
    those of `sweep.driver.sweep`. For a budget of perplexity, `search` are held-out windows to look at it on, `limit`
    is the increase that is looked for there, and `attempt` counts from 1, as that may have to be less than was asked.
    For a budget of time, `times` are those of each layer.
    """

    recipe: Recipe
    budget: Budget
    model_dir: Path
    base_digest: str
    windows_ST: Tensor
    bos_tokens: int
    device: str
    work: Path
    form: LayerForm
    prior: Callable[[str], Tensor] | None = None
    prior_digest: str | None = None
    search: HeldOutText | None = None
    limit: float = 0.0
    attempt: int = 1
    times: Sequence[Times] = ()

    @property
    def text(self) -> HeldOutText:
        """The windows on which costs are measured."""
        return HeldOutText(self.windows_ST[: self.budget.windows], self.bos_tokens, ["calibration"])

    @property
    def measured(self) -> Recipe:
        """How everything is pruned to look at one layer after the other."""
        return self.recipe.symmetric()

    @property
    def strict_digest(self) -> str:
        """The digest of the run that prunes everything."""
        return run_digest(self.measured, self.base_digest, self.windows_ST, self.device, self.prior_digest)

    def file(self, kind: str, *what: Any) -> Path:
        """Where one thing about this run is kept."""
        digest = digest_json({"run": self.strict_digest, "what": what}).removeprefix("sha256:")
        return self.work / FOLDER / f"{kind}-{digest[:16]}.json"

    def plan(self, loaded: nn.Module) -> Plan:
        """Everything that the recipe prunes."""
        return plan_of(self.model_dir, self.recipe.pattern, self.recipe.ignore, loaded)


def layers_of(model_dir: Path, plan: Plan, form: LayerForm) -> list[ServedLayer]:
    """The layers that `plan` prunes of the model in `model_dir`, those together that are served as one, and their bytes
    where `form` is stored of the sparse ones."""
    headers = read_headers(model_dir)
    names = [name for block in plan.targets for name in block]
    sizes = {name: _ITEMSIZE[headers[name + WEIGHT_SUFFIX].dtype] for name in names}
    return served_layers(plan.targets, plan.groups, form, sizes)


def check(budget: Budget, layers: Sequence[ServedLayer], times: Sequence[Times] = ()) -> None:
    """`RecipeError` for a budget that cannot be met, whatever is pruned; it says the nearest that can. Also for layers
    that take no less sparse than dense, as then there is nothing to choose."""
    large = next((layer for layer in layers if layer.sparse_bytes >= layer.dense_bytes), None)
    if large is not None:
        raise RecipeError(
            f"[budget]: {large.name} takes {large.sparse_bytes} bytes sparse, {large.correction_bytes} of them for "
            f"corrections, and {large.dense_bytes} dense, so sparsity saves none; choose a lower rank"
        )
    dense = sum(layer.dense_bytes for layer in layers)
    least, added = (
        sum(getattr(layer, kind) for layer in layers) / dense for kind in ("sparse_bytes", "correction_bytes")
    )
    if budget.bytes is not None and budget.bytes < least:
        raise RecipeError(
            f"budget.bytes {budget.bytes:g}: with every layer sparse, prunable weights take {least:.4f} of their dense "
            f"bytes{f', {added:.4f} of them for corrections (rank)' if added else ''}; the nearest budget that can be "
            f"met is {math.ceil(least * 1e4) / 1e4:g}"
        )
    most = sum(dense for dense, _ in times) / sum(map(min, times)) if times else math.inf
    if budget.speedup is not None and budget.speedup > most:
        raise RecipeError(
            f"budget.speedup {budget.speedup:g}: with every layer sparse that is faster so, one token is {most:.4f} "
            f"times as fast; the nearest budget that can be met is {math.floor(most * 1e4) / 1e4:g}"
        )


def folder_of(measuring: Measuring, allocation: Allocation) -> Path:
    """The work directory of the sweep that leaves the layers of `allocation` dense."""
    return measuring.file("sweep", measuring.recipe.digest(), sorted(allocation.dense)).with_suffix("")


def allocate(measuring: Measuring, progress: Callable[[Progress], None]) -> Allocation:
    """Spend the budget, or read how an earlier process did.

    Raises what a sweep does, and `RecipeError` for a budget that cannot be met.
    """
    file = measuring.file("spent", measuring.budget.model_dump(), measuring.limit, measuring.times)
    if file.is_file():
        return load_allocation(file)
    swept = _strict(measuring, progress)
    gc.collect()
    loaded = model.load(measuring.model_dir)
    plan = measuring.plan(loaded)
    layers = layers_of(measuring.model_dir, plan, measuring.form)
    probe = Probe.of(loaded, plan, measuring.text, measuring.device)

    def sparse(name: str) -> Tensor:
        return swept.layer(name).dense(blocks.COMPUTE_DTYPE)

    by_name = _costs(measuring, probe, sparse, progress)
    cost = [math.fsum(by_name[name] for name in layer.layers) for layer in layers]
    looks: list[Look] = []
    if measuring.budget.bytes is not None:
        kept = within_bytes(layers, cost, measuring.budget.bytes)
    elif measuring.budget.speedup is not None:
        kept = within_time(cost, measuring.times, measuring.budget.speedup)
    else:
        assert measuring.search is not None
        search = Probe.of(loaded, plan, measuring.search, measuring.device)
        kept, looks = within_increase(layers, cost, measuring.limit, _looking(measuring, search, sparse, progress))
    allocation = Allocation(
        asked=measuring.budget.asked,
        bytes=share_of(layers, kept),
        speedup=speedup_of(measuring.times, kept) if measuring.times else None,
        strict_kl=_divergence(probe, sparse, frozenset()),
        kl=_divergence(probe, sparse, names_of(layers, kept)),
        windows=len(measuring.text.ids_ST),
        window_tokens=measuring.windows_ST.shape[1],
        layers=tuple(map(_record, layers, cost, kept)),
        search=tuple(looks),
        search_windows=len(measuring.search.ids_ST) if looks and measuring.search is not None else 0,
    )
    write_json(file, allocation.model_dump(mode="json"))
    return allocation


def _strict(measuring: Measuring, progress: Callable[[Progress], None]) -> WorkDir:
    """Prune every layer of a throw-away copy of the model."""
    loaded = model.load(measuring.model_dir)
    _, swept = sweep(
        loaded, measuring.plan(loaded), measuring.measured, measuring.windows_ST, measuring.work, measuring.base_digest,
        measuring.device, progress, measuring.prior, measuring.prior_digest,
    )  # fmt: skip
    return swept


def _costs(
    measuring: Measuring, probe: Probe, sparse: Weights, progress: Callable[[Progress], None]
) -> Mapping[str, float]:
    """What the sparsity of each layer costs, by name; kept in the work directory, and continued if that was stopped."""
    file = measuring.file("costs", len(measuring.text.ids_ST))
    known: list[dict[str, float]] = read_json(file)["points"] if file.is_file() else []
    costs(probe, sparse, known, progress, lambda: write_json(file, {"points": known}))
    return {name: math.fsum(point[name] for point in known) for name in known[0]}


def _looking(
    measuring: Measuring, probe: Probe, sparse: Weights, progress: Callable[[Progress], None]
) -> Callable[[frozenset[str]], float]:
    """How much the perplexity is higher than dense with some layers dense; kept in the work directory, too."""
    file, started_s = measuring.file("looks", digest_tokens(probe.text.ids_ST)), time.perf_counter()
    known: dict[str, float] = read_json(file) if file.is_file() else {}
    done = 0

    def look(dense: frozenset[str]) -> float:
        nonlocal done
        key = digest_json(sorted(dense))
        if key not in known:
            measured = _compared(probe, sparse, dense)
            assert measured.dense is not None
            known[key] = measured.perplexity.value / measured.dense.value - 1
            write_json(file, known)
        what = f"search: {len(dense)} layers dense, perplexity {100 * known[key]:+.1f} %"
        progress(Progress(done, LOOKS + 2, what, time.perf_counter() - started_s, peak_rss_bytes()))
        done += 1
        return known[key]

    return look


def _record(layer: ServedLayer, cost: float, is_dense: bool) -> LayerCost:
    return LayerCost(
        layers=layer.layers,
        dense=is_dense,
        cost=cost,
        dense_bytes=layer.dense_bytes,
        sparse_bytes=layer.sparse_bytes,
    )


def _divergence(probe: Probe, sparse: Weights, dense: frozenset[str]) -> float:
    """KL divergence from the dense model, where all layers but these are sparse."""
    divergence = _compared(probe, sparse, dense).divergence
    assert divergence is not None
    return divergence.kl


def _compared(probe: Probe, sparse: Weights, dense: frozenset[str]) -> Measured:
    *_, outputs = probe.forward(mixture(probe, lambda name: float(name not in dense), sparse))
    return probe.compare(outputs)
