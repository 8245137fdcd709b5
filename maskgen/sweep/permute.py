"""Reorder hidden neurons so that an N:M pattern keeps more of them; the model computes what it did before.

    down_proj(act(gate_proj(x)) * up_proj(x)):   columns of down_proj, rows (and biases) of gate_proj and up_proj

The result is an ordinary dense model directory: any recipe can prune it, any engine can serve it, and serving it costs
nothing more, because weights are moved, not activations. The scores are those of a one-shot method (`ScoreMethod`), the
order is found by `maskgen.sweep.arrange`, and blocks are run one by one, dense, as in a sweep. Only hidden neurons are
reordered: the inputs of every other pruned layer are also read by layers outside of their block, or belong to heads.

Each block is run again in its new order, in float32. If what it adds to any token has changed by more than rounding,
that is an error and nothing is written.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.

Legend: S = windows, T = tokens, B = batch, D = hidden size, O = out features, I = in features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskgen.core.checkpoint import iterate_tensors, read_dense_config, read_headers
from maskgen.core.companions import companion_files
from maskgen.core.errors import ModelError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.core.writer import SHARD_BYTES, CheckpointWriter
from maskgen.hf import blocks
from maskgen.hf.layers import decoder_blocks
from maskgen.hf.model import max_tokens
from maskgen.hf.planning import Plan
from maskgen.methods import ScoreMethod
from maskgen.numerics.memory import peak_rss_bytes
from maskgen.numerics.units import FEEDS, NEURONS, kind_of
from maskgen.recipes.recipe import Recipe
from maskgen.sweep.arrange import Arrangement, arrange
from maskgen.sweep.observe import observe
from maskgen.sweep.report import BLOCK_DONE, Progress

PERMUTATION_FILE = "permutation.json"
"""File in a reordered model that holds each layer's order, and the digests of recipe, base model and data."""

PROBE_TOKENS = 16
"""How many tokens blocks are checked with if the method needs no calibration text."""

TOLERANCE, ROUNDING = 1e-3, 1e-5
"""Most change of a block's output for one token, by L2 norm: the first times the norm of what the block adds to the
token, plus the second times the norm of the output. Both leave room for float32's rounding only."""


@dataclass(frozen=True)
class PermuteReport:
    """The new order of each FFN's neurons, by the name of its `down_proj`, and the bytes of weights written."""

    arrangements: Mapping[str, Arrangement]
    total_bytes: int

    @property
    def kept(self) -> tuple[float, float]:
        """Fraction of the scores that the pattern keeps, before and after, mean over layers."""
        arrangements = self.arrangements.values()
        return mean(one.before for one in arrangements), mean(one.after for one in arrangements)


def score_method(recipe: Recipe) -> ScoreMethod:
    """The method of `recipe`; `RecipeError` if it is none that gives every weight a score (`ScoreMethod`)."""
    method = recipe.build_method()
    if not isinstance(method, ScoreMethod):
        raise RecipeError(
            f"method.name: {recipe.method.name} has no scores that are independent of the groups; order neurons with "
            "ria, wanda or magnitude, then run any recipe on the result"
        )
    return method


@torch.no_grad()
def find(
    model: nn.Module,
    todo: Plan,
    recipe: Recipe,
    windows_ST: Tensor | None,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Arrangement]:
    """Find an order for the neurons of every FFN that `todo` plans to prune, and bring `model` into it.

    `windows_ST` are calibration tokens, or None for a method that needs none. Returns the orders by the name of each
    `down_proj`. Raises `RecipeError` (the method has no scores), `DataError` (calibration text), `NumericalError`
    (NaN, or a layer that no input reached), and `ModelError`: there is no such FFN, or a block computes something else
    in its new order.
    """
    method, started_s = score_method(recipe), time.perf_counter()
    prefix, _ = decoder_blocks(model)
    ffn_outputs = [
        {name: linear for name, linear in block.items() if kind_of(name) == NEURONS} for block in todo.targets
    ]
    if not any(ffn_outputs):
        raise ModelError(
            f"{type(model).__name__}: no block has a {NEURONS} that this recipe prunes; only neurons between "
            f"{' or '.join(FEEDS[NEURONS])} and {NEURONS} can be reordered"
        )
    windows_ST = _windows(model, recipe, method, windows_ST)
    recording = blocks.record(model, todo.blocks, windows_ST.split(recipe.calibration.batch))
    run = _Run(method, recipe.pattern, recording, torch.device(device), todo.stored)
    arrangements: dict[str, Arrangement] = {}
    for index, block in enumerate(todo.blocks):
        with blocks.upcast(block, run.device):
            arrangements |= run.reorder(index, block, f"{prefix}.{index}", ffn_outputs[index])
        if progress is not None:
            elapsed_s = time.perf_counter() - started_s
            progress(Progress(index, len(todo.blocks), BLOCK_DONE, elapsed_s, peak_rss_bytes()))
    return arrangements


def write(
    model_dir: Path,
    arrangements: Mapping[str, Arrangement],
    out_dir: Path,
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> PermuteReport:
    """Write the model of `model_dir` with its neurons in the order of `arrangements`, one tensor at a time.

    `provenance` is a JSON object written to `PERMUTATION_FILE` with the orders. Raises `OutputExistsError`; then
    nothing is left behind.
    """
    orders = {name: arrangement.order for name, arrangement in arrangements.items()}
    layers = {
        name: {"before": arrangement.before, "after": arrangement.after, "order": arrangement.order.tolist()}
        for name, arrangement in arrangements.items()
    }
    config, extra = read_dense_config(model_dir), {PERMUTATION_FILE: {**provenance, "layers": layers}}
    with CheckpointWriter(out_dir, config, companion_files(model_dir), extra, shard_bytes) as writer:
        for name, tensor in iterate_tensors(read_headers(model_dir)):
            writer.add(name, reordered(name, tensor, orders))
    return PermuteReport(arrangements, writer.total_bytes)


def reordered(name: str, tensor: Tensor, orders: Mapping[str, Tensor]) -> Tensor:
    """The tensor called `name` in the model, with its neurons in the new order; as it is if it has none of them.

    `orders` maps the names of `down_proj` layers to the old index of the neuron in each new place, `[I]`.
    """
    module, _, parameter = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if module in orders and parameter == "weight":
        return tensor[:, orders[module]]
    site = f"{parent}.{NEURONS}"
    if leaf in FEEDS[NEURONS] and site in orders and parameter in ("weight", "bias"):
        return tensor[orders[site]]
    return tensor


def _windows(model: nn.Module, recipe: Recipe, method: ScoreMethod, windows_ST: Tensor | None) -> Tensor:
    """The tokens that blocks are run on, `[S, T]`: the calibration windows, or `PROBE_TOKENS` if none are needed."""
    if method.needs_data:
        assert windows_ST is not None
        return windows_ST
    limit, config = max_tokens(model), cast(Any, model.config)
    return torch.arange(min(PROBE_TOKENS, limit or PROBE_TOKENS, config.get_text_config(decoder=True).vocab_size))[None]


@dataclass(frozen=True)
class _Run:
    """One pass over a model; `recording.hidden` holds the inputs of the block that comes next.

    `stored` maps names of the model's tensors to those in the files.
    """

    method: ScoreMethod
    pattern: NMPattern
    recording: blocks.Recording
    device: torch.device
    stored: Mapping[str, str]

    def reorder(
        self, index: int, block: nn.Module, block_name: str, ffn_outputs: Mapping[str, nn.Linear]
    ) -> dict[str, Arrangement]:
        """Run a float32 block on all batches, reorder its neurons, and check that its first output stays the same."""
        first_BTD, call = self.recording.hidden[0], self.recording.call(0, index)
        inputs = observe(self.method, ffn_outputs, block, index, self.recording, self.device, keep_outputs=True)
        arrangements = {}
        for name, linear in ffn_outputs.items():
            stats = inputs.take(name) if self.method.needs_data else None
            score_OI = self.method.score(linear.weight, stats)
            blocks.check_finite(score_OI, f"{name}: scores")
            arrangements[name] = arrange(score_OI, self.pattern)
        orders = {name: one.order.to(self.device) for name, one in arrangements.items()}
        for name, parameter in block.named_parameters():
            own = f"{block_name}.{name}"
            parameter.data = reordered(self.stored.get(own, own), parameter.data, orders)
        again_BTD = blocks.run(block, first_BTD, call, self.device)
        _check_same(first_BTD, self.recording.hidden[0], again_BTD, block_name)
        return arrangements


def _check_same(before_BTD: Tensor, expected_BTD: Tensor, reordered_BTD: Tensor, what: str) -> None:
    """Raise `ModelError` if a block's output has changed by more than rounding.

    Tokens are compared one by one, relative to what the block adds to each: neither a few huge tokens nor a huge
    residual stream can hide a difference.
    """
    difference_BT = (expected_BTD - reordered_BTD).norm(dim=-1)
    added_BT = (expected_BTD - before_BTD).norm(dim=-1)
    if not bool((difference_BT <= TOLERANCE * added_BT + ROUNDING * expected_BTD.norm(dim=-1)).all()):
        worst = float((difference_BT / added_BT.clamp_min(1e-30)).max())
        raise ModelError(
            f"{what}: with its neurons in another order, what it adds to a token differs by up to {worst:.2g} of its "
            f"size, so the way to {NEURONS} is not one neuron at a time; keep these layers out with ignore"
        )
