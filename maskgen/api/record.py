"""Keeps what `evaluate` found beside the weights, as the measurement that `inspect`, `doctor` and the server show.

`maskgen run` does so by itself; this is for models without one: those whose values were quantised later, whose masks
were applied with `maskgen compress`, or that were pruned without text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maskgen.api.requests import EvaluateRequest
from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.digest import digest_weights
from maskgen.core.divergence import Divergence
from maskgen.core.errors import ModelError, RequestError, clip
from maskgen.core.files import check_writable, read_json, write_json
from maskgen.core.perplexity import Perplexity
from maskgen.core.quality import MAX_TEXTS, QUALITY_FILE, UNKNOWN_METHOD, Quality, is_method
from maskgen.hf.evaluate import Measured
from maskgen.hf.pruning_cost import HeldOutText, quality_of
from maskgen.recipes.recipe import RECIPE_FILE

if TYPE_CHECKING:
    from maskgen.api.measuring import TextResult


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """How a model was made: the name of its recipe's method, and its N:M pattern ("" for a dense directory)."""

    method: str
    pattern: str


def check_keep(request: EvaluateRequest) -> None:
    """`RequestError` if the result cannot be kept as asked, `StorageError` if the directory cannot be written."""
    if not request.keep:
        return
    if request.against is None:
        raise RequestError("`keep`: what is kept is the comparison with the dense model; give that as `against`")
    if not Path(request.model).is_dir():
        raise RequestError(f"`keep`: {request.model} is not a directory, beside whose weights a result can be kept")
    if len(request.data) > MAX_TEXTS:
        raise RequestError(f"`keep`: {len(request.data)} texts in `data`, at most {MAX_TEXTS} are kept")
    check_writable(Path(request.model) / QUALITY_FILE)


def made_from(model: str, dense_dir: Path) -> Made:
    """How `model` was made. `ModelError` if `dense_dir` does not hold the dense model that a checkpoint names."""
    path, pattern = Path(model), ""
    if is_sparse_checkpoint(path):
        pattern = str(SparseCheckpoint.open(path, verify_bits=False).config.pattern)
        if other := _another_base(path, dense_dir):
            raise ModelError(f"{other}; give that model, or leave `keep` out")
    return Made(_method(path), pattern)


def warn_of_another_base(model_dir: Path, dense_dir: Path) -> None:
    """A sparse checkpoint may be compared with any model, but people should know when that is not its own."""
    other = _another_base(model_dir, dense_dir) if is_sparse_checkpoint(model_dir) else None
    if other:
        logger.warning("%s; how far the two are apart says little about pruning", other)


def _another_base(checkpoint: Path, dense_dir: Path) -> str | None:
    """That a sparse checkpoint was made from another model than the one in `dense_dir`, in words, if it was."""
    config = SparseCheckpoint.open(checkpoint, verify_bits=False).config
    digest = digest_weights(dense_dir)
    if config.base_digest == digest:
        return None
    return (
        f"`against` {dense_dir}: its weights have digest {digest}, but {checkpoint} was made from "
        f"{clip(config.base_model)} with {config.base_digest}"
    )


def keep(made: Made, model_dir: Path, results: Sequence[TextResult]) -> Quality:
    """Write what was found on all texts together, as a mean over their windows or tokens; an older file is replaced."""
    protocol = results[0].perplexity.protocol
    ids_ST = torch.tensor([window.ids for result in results for window in result.windows])
    text = HeldOutText(ids_ST, int(protocol.bos), [result.text for result in results])
    quality = quality_of(_together(results), text, made.method, made.pattern)
    write_json(model_dir / QUALITY_FILE, quality.to_dict())
    return quality


def _together(results: Sequence[TextResult]) -> Measured:
    """The windows of all texts as if they were of one."""
    dense = [result.dense for result in results if result.dense is not None]
    divergences = [result.divergence for result in results if result.divergence is not None]
    divergence = Divergence(
        [value for one in divergences for value in one.kl_per_window],
        [value for one in divergences for value in one.agreement_per_window],
        [count for one in divergences for count in one.scored_tokens_per_window],
    )
    return Measured(_joined([result.perplexity for result in results]), _joined(dense), divergence)


def _joined(measured: Sequence[Perplexity]) -> Perplexity:
    return Perplexity(
        measured[0].protocol,
        [value for one in measured for value in one.nll_per_window],
        [count for one in measured for count in one.scored_tokens_per_window],
        measured[0].tokens_digest,
    )


def _method(model_dir: Path) -> str:
    """The method of the recipe beside the weights, which may be missing, or be any JSON object."""
    path = model_dir / RECIPE_FILE
    if not path.is_file():
        return UNKNOWN_METHOD
    recipe = read_json(path)
    name = recipe["method"].get("name") if isinstance(recipe.get("method"), dict) else None
    return name if is_method(name) else UNKNOWN_METHOD
