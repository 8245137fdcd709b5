"""Reorder hidden neurons so that an N:M pattern keeps more of them; the model computes what it did before.

    down_proj(act(gate_proj(x)) * up_proj(x)):    columns of down_proj, rows of gate_proj and up_proj, biases with rows

What comes out is a stock dense directory: any recipe prunes it, learned ones too, any engine serves it, and nothing is
gathered at run time. Scores are a one-shot method's (`ScoreMethod`), the order is `maskgen.arrange`'s; blocks are run
one by one, dense, as in a sweep.

Other inputs could be reordered for free as well: those of o_proj within a head, and the residual stream in one order
for the whole model. Both were tried on the reference model, and both kept more of the scores without lowering
perplexity, so only neurons are moved.

Before anything is written each block is run in its new order, in float32, and has to give what it gave.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.

Legend: S = windows, T = tokens, B = batch, D = hidden size, O = out features, I = in features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from maskgen import blocks
from maskgen.arrange import Arrangement, arrange
from maskgen.compress import check_source, companion_files, iterate_tensors
from maskgen.core.errors import ModelError, NumericalError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.core.units import FEEDS, NEURONS, kind_of
from maskgen.core.writer import SHARD_BYTES, CheckpointWriter
from maskgen.data import check_window_tokens
from maskgen.memory import peak_rss_bytes
from maskgen.method import ScoreMethod
from maskgen.model import decoder_blocks, max_tokens, plan
from maskgen.recipe import Recipe
from maskgen.sweep import Progress

PROVENANCE_FILE = "permutation.json"
PROBE_TOKENS, TOLERANCE = 16, 1e-3
"""What blocks are checked with where a method needs no data; relative difference of a block's outputs (L2)."""


@dataclass(frozen=True)
class PermuteReport:
    """The arrangement of each `down_proj` by name, and what was written."""

    arrangements: Mapping[str, Arrangement]
    total_bytes: int

    @property
    def kept(self) -> tuple[float, float]:
        """Fraction of its scores that a layer keeps, before and after, mean over layers."""
        found = self.arrangements.values()
        return mean(one.before for one in found), mean(one.after for one in found)


def score_method(recipe: Recipe) -> ScoreMethod:
    """The method of a recipe that has scores; `RecipeError` for others."""
    method = recipe.build_method()
    if not isinstance(method, ScoreMethod):
        raise RecipeError(
            f"method.name: {recipe.method.name} has no scores that are independent of the groups; order neurons with "
            "ria, wanda or magnitude, then run any recipe on the result"
        )
    return method


def permute(
    model_dir: Path,
    model: nn.Module,
    recipe: Recipe,
    windows_ST: Tensor | None,
    out_dir: Path,
    provenance: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> PermuteReport:
    """Write the model of `model_dir`, loaded as `model` (changed in place), with its neurons in a better order.

    `windows_ST` are calibration tokens, or None for a method that needs none; `provenance` is written beside the
    weights. Raises `RecipeError`, `DataError`, `ModelError` (no such FFN, or not the same function afterwards),
    `OutputExistsError`; then nothing is left behind.
    """
    arrangements = find(model, recipe, windows_ST, device, progress)
    todo = plan(model, recipe.pattern, recipe.ignore)
    targets = [name for block in todo.targets for name in block]
    hf_config, headers = check_source(model_dir, recipe.pattern, targets, todo.ignored)
    orders = {name: found.order for name, found in arrangements.items()}
    kept = {name: {"before": found.before, "after": found.after} for name, found in arrangements.items()}
    extra = {PROVENANCE_FILE: {"recipe": recipe.resolved(), **provenance, "kept": kept}}
    with CheckpointWriter(out_dir, hf_config, companion_files(model_dir), extra, shard_bytes) as writer:
        for name, tensor in iterate_tensors(headers):
            writer.add(name, moved(name, tensor, orders))
    return PermuteReport(arrangements, writer.total_bytes)


@torch.no_grad()
def find(
    model: nn.Module,
    recipe: Recipe,
    windows_ST: Tensor | None,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Arrangement]:
    """An order for the neurons of every FFN that `recipe` prunes, by name of its `down_proj`; applied to `model`."""
    method, todo, started_s = score_method(recipe), plan(model, recipe.pattern, recipe.ignore), time.perf_counter()
    prefix, _ = decoder_blocks(model)
    sites = [{name: linear for name, linear in block.items() if kind_of(name) == NEURONS} for block in todo.targets]
    if not any(sites):
        raise ModelError(
            f"{type(model).__name__}: no block has a {NEURONS} to prune, fed by {' and '.join(FEEDS[NEURONS])}; "
            "neurons of other FFNs cannot be reordered"
        )
    if windows_ST is None:
        windows_ST = torch.arange(PROBE_TOKENS)[None]
    check_window_tokens(windows_ST.shape[1], max_tokens(model))
    recording = blocks.record(model, todo.blocks, windows_ST.split(recipe.calibration.batch))
    run = _Run(method, recipe.pattern, recording, torch.device(device))
    arrangements: dict[str, Arrangement] = {}
    for index, block in enumerate(todo.blocks):
        with blocks.upcast(block, run.device):
            arrangements |= run.reorder(index, block, f"{prefix}.{index}", sites[index])
        if progress is not None:
            elapsed_s = time.perf_counter() - started_s
            progress(Progress(index, len(todo.blocks), "block done", elapsed_s, peak_rss_bytes()))
    return arrangements


def moved(name: str, tensor: Tensor, orders: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the model, by its full name, with neurons in the order of `orders` (`[I]` by `down_proj`)."""
    module, _, parameter = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if module in orders and parameter == "weight":
        return tensor[:, orders[module]]
    site = f"{parent}.{NEURONS}"
    if leaf in FEEDS[NEURONS] and site in orders:
        return tensor[orders[site]]
    return tensor


@dataclass(frozen=True)
class _Run:
    """One pass over a model; `recording.hidden` goes from block to block."""

    method: ScoreMethod
    pattern: NMPattern
    recording: blocks.Recording
    device: torch.device

    def reorder(
        self, index: int, block: nn.Module, block_name: str, sites: Mapping[str, nn.Linear]
    ) -> dict[str, Arrangement]:
        """Advance all batches past a float32 block, order its neurons, and see that it does what it did."""
        first_BTD, call = self.recording.hidden[0], self.recording.call(0, index)
        stats = self._advance(index, block, sites)
        found = {}
        for name, linear in sites.items():
            if self.method.needs_data and name not in stats:
                raise NumericalError(f"{name}: no calibration input ever reached this layer; give more text")
            score_OI = self.method.score(linear.weight, stats.get(name))
            blocks.check_finite(score_OI, f"{name}: scores")
            found[name] = arrange(score_OI, self.pattern)
        orders = {name: one.order.to(self.device) for name, one in found.items()}
        for name, parameter in block.named_parameters():
            parameter.data = moved(f"{block_name}.{name}", parameter.data, orders)
        _check_same(self.recording.hidden[0], blocks.run(block, first_BTD, call, self.device), block_name)
        return found

    def _advance(self, index: int, block: nn.Module, sites: Mapping[str, nn.Linear]) -> dict[str, Any]:
        """Run a block on all batches; the method's statistics of the inputs of its sites."""
        stats: dict[str, Any] = {}

        def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                stats[name] = self.method.observe(stats.get(name), args[0].reshape(-1, args[0].shape[-1]))

            return observe

        handles = [linear.register_forward_pre_hook(observer(name)) for name, linear in sites.items()]
        try:
            for batch, hidden_BTD in enumerate(self.recording.hidden):
                call = self.recording.call(batch, index)
                self.recording.hidden[batch] = blocks.run(block, hidden_BTD, call, self.device)
                blocks.check_finite(self.recording.hidden[batch], f"output of block {index}")
        finally:
            for handle in handles:
                handle.remove()
        return stats


def _check_same(expected_BTD: Tensor, found_BTD: Tensor, what: str) -> None:
    difference = float((expected_BTD - found_BTD).norm() / expected_BTD.norm().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{what}: with its neurons in another order its outputs differ by {difference:.2g} of their size; this FFN "
            f"is not {NEURONS}(f({FEEDS[NEURONS][0]}) * {FEEDS[NEURONS][1]}), and is left as it is"
        )
