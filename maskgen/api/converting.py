"""`permute`, `compress`, `convert` and `decompress`: one model directory -> another."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from maskgen.api import checks
from maskgen.api.events import Listener, Stage, silent
from maskgen.api.pruning import load_checked
from maskgen.api.quantising import group_of
from maskgen.api.requests import (
    CompressRequest,
    ConvertRequest,
    DecompressRequest,
    PermuteRequest,
)
from maskgen.api.task import Task, calibration, settled
from maskgen.api.text import read_text, with_own_text
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import StoredModel, digest_weights
from maskgen.core.failures import explained
from maskgen.core.pattern import NMPattern
from maskgen.data import tokens
from maskgen.export import compress as compress_module
from maskgen.export import convert as convert_module
from maskgen.export.compress import CompressReport
from maskgen.export.convert import ConvertReport
from maskgen.hf import gguf, planning
from maskgen.recipes.recipe import Recipe
from maskgen.sweep import permute as permute_module
from maskgen.sweep.arrange import Arrangement
from maskgen.sweep.permute import PermuteReport


@dataclass(frozen=True)
class PermuteResult:
    """A dense model in `out`, the recipe whose scores were used, and how the neurons were arranged."""

    out: Path
    recipe: Recipe
    report: PermuteReport


@dataclass(frozen=True)
class CompressResult:
    """A sparse checkpoint in `out`, and what was written."""

    out: Path
    written: CompressReport


@dataclass(frozen=True)
class ConvertResult:
    """A sparse checkpoint in `out`, what it was made from, and what was written."""

    out: Path
    report: ConvertReport


@dataclass(frozen=True)
class DecompressResult:
    """A dense model in `out`, of `total_bytes` of tensors.

    With `folded`, the checkpoint had corrections: they are part of the weights now, which have no zeros left.
    """

    out: Path
    total_bytes: int
    folded: bool


@explained()
def permute(request: PermuteRequest, progress: Listener = silent) -> PermuteResult:
    """Reorder hidden neurons so that masks keep more of the weights that matter; the function stays the same.

    Raises `RecipeError` for a method without scores, `OutputExistsError`, `ModelError`, `DataError`, `RequestError`,
    `NumericalError`.
    """
    recipe = checks.load_recipe(request)
    permute_module.score_method(recipe)
    with checks.new_output(request.out):
        task = settled(request, recipe, progress)
        calibration(request, task)
        request = with_own_text(request, task, progress)
        windows_ST, _, _ = read_text(request, task)
        weights = StoredModel.of(task.model_dir)
        provenance = {
            "recipe": task.recipe.resolved(),
            "base_model": task.label,
            "base_digest": digest_weights(task.model_dir),
            "data_digest": None if windows_ST is None else tokens.digest_tokens(windows_ST),
        }
        arrangements = _arrange(task, windows_ST, progress)
        gc.collect()
        progress(Stage("writing"))
        weights.check()
        report = permute_module.write(task.model_dir, arrangements, request.out, provenance)
    return PermuteResult(request.out, task.recipe, report)


@explained()
def compress(request: CompressRequest, progress: Listener = silent) -> CompressResult:
    """Apply existing masks to the dense model they were made for.

    Raises `FormatError` when the masks are of other weights, `ModelError`, `OutputExistsError`.
    """
    with checks.new_output(request.out):
        masks = compress_module.load_masks(request.masks)
        model_dir = checks.find_model(request.model, progress)
        ignored = planning.dense_names(model_dir, masks.bitmasks)
        written = compress_module.compress_masks(
            model_dir, masks, request.out, ignored, values=request.values, group=group_of(request)
        )
    return CompressResult(request.out, written)


@explained()
def convert(request: ConvertRequest, progress: Listener = silent) -> ConvertResult:
    """Write a checkpoint of another tool, whose weights are sparse, as one of ours.

    Raises `FormatError` for a file that is damaged or in a layout that is not known, `ModelError` where no layer
    follows the pattern, `PatternError`, `OutputExistsError`.
    """
    with checks.new_output(request.out):
        pattern, model_dir = NMPattern.parse(request.pattern), checks.find_model(request.model, progress)
        report = convert_module.convert(
            model_dir, request.out, pattern, request.masks, tell=lambda what: progress(Stage(what))
        )
    return ConvertResult(request.out, report)


@explained()
def decompress(request: DecompressRequest) -> DecompressResult:
    """Write a sparse checkpoint, or a GGUF file, as an ordinary dense model, zeros included, for other tools.

    Raises `FormatError` for what is neither, `OutputExistsError`, and for a GGUF file what `maskgen.hf.gguf.convert`
    does.
    """
    with checks.new_output(request.out):
        if gguf.is_gguf(request.model):
            gguf.convert(request.model, request.out)
            return DecompressResult(request.out, sum(file.stat().st_size for file in request.out.iterdir()), False)
        total_bytes = compress_module.decompress(request.model, request.out)
    config = SparseCheckpoint.open(request.model, verify_bits=False).config
    return DecompressResult(request.out, total_bytes, config.correction is not None)


def _arrange(task: Task, windows_ST: Tensor | None, progress: Listener) -> Mapping[str, Arrangement]:
    """Load and order. The dense model lives in here only: what follows needs the memory, and not the model."""
    progress(Stage("loading"))
    loaded, plan = load_checked(task)
    return permute_module.find(loaded, plan, task.recipe, windows_ST, task.device, progress)
