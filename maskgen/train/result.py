"""What a finished training run writes, by `LearnedMethod.result`.

    SPARSE   a sparse checkpoint: masks, kept values in the stored dtype, corrections
    DENSE    a stock Hugging Face directory with the trained weights
    SLICED   a stock Hugging Face directory with fewer heads and neurons (`export.slice`)

What was trained beside the layers to prune, as `scope` says (norms, embeddings), replaces what is stored. Layers are
solved one at a time while tensors stream to disk, so nothing is held twice.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.checkpoint import WEIGHT_SUFFIX, TensorHeader, iterate_tensors, read_headers
from maskgen.core.companions import companion_files
from maskgen.core.config import SparseConfig
from maskgen.core.errors import ModelError
from maskgen.core.files import read_json
from maskgen.core.mask import MaskSet, pack_bits
from maskgen.core.packed import PackedTensor, StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.core.writer import CheckpointWriter
from maskgen.export import compress
from maskgen.export import slice as slice_module
from maskgen.export.compress import CompressReport
from maskgen.methods.learned import Result
from maskgen.train.checkpoints import trained_tensors
from maskgen.train.start import Start
from maskgen.train.step import Session


@dataclass(frozen=True)
class Origin:
    """What a result comes from: the dense model in `model_dir`, under a label for people, and a recipe.

    `start` is the checkpoint that training went on from, if it was one.
    """

    model_dir: Path
    label: str
    base_digest: str
    recipe_digest: str
    pattern: NMPattern
    start: Start | None = None


@dataclass(frozen=True)
class DenseReport:
    """What was written of a model that has no masks: bytes of all tensors."""

    total_bytes: int


Written = CompressReport | DenseReport | slice_module.ShrinkReport


def write(
    session: Session,
    origin: Origin,
    out_dir: Path,
    ignored: Iterable[str],
    extra: Mapping[str, Any],
    masks_out: Path | None = None,
) -> Written:
    """The result, by kind; its masks also to `masks_out`, for a method that has some."""
    result = session.method.result
    if result is Result.SPARSE:
        masks, written = write_sparse(session, origin, out_dir, ignored, extra)
        if masks_out is not None:
            masks.save(masks_out)
        return written
    if result is Result.DENSE:
        return write_dense(session, origin, out_dir, extra)
    return write_sliced(session, origin, out_dir, extra)


@torch.no_grad()
def write_sparse(
    session: Session, origin: Origin, out_dir: Path, ignored: Iterable[str], extra: Mapping[str, Any]
) -> tuple[MaskSet, CompressReport]:
    """A sparse checkpoint, and the masks it was made with. `ignored` are the linear layers that stay dense."""
    bitmasks = {}
    for name, layer in session.layers.items():
        solution = layer.solution()
        origin.pattern.check_mask(solution.mask, name)
        bitmasks[name] = pack_bits(solution.mask.cpu())
    masks = MaskSet(origin.pattern, bitmasks, origin.base_digest, origin.recipe_digest)
    config = SparseConfig(
        pattern=origin.pattern,
        targets=masks.names,
        ignored=tuple(ignored),
        mask_digest=masks.digest(),
        recipe_digest=origin.recipe_digest,
        base_model=origin.label,
        base_digest=origin.base_digest,
        correction=session.method.correction,
    )

    def pack(name: str, weight_OI: Tensor) -> StoredLayer:
        solution = session.layers[name].solution()
        if solution.weight is not None:
            weight_OI = solution.weight.to("cpu", weight_OI.dtype)
        return StoredLayer(PackedTensor.pack(weight_OI, solution.mask.cpu(), origin.pattern, name), solution.correction)

    others = _replaced(session, origin, read_headers(origin.model_dir))
    return masks, compress.compress(origin.model_dir, config, pack, out_dir, extra, others=others)


@torch.no_grad()
def write_dense(session: Session, origin: Origin, out_dir: Path, extra: Mapping[str, Any]) -> DenseReport:
    """The model with its trained tensors in place of the stored ones, in the stored dtypes."""
    headers = read_headers(origin.model_dir)
    others = _replaced(session, origin, headers)
    hf_config = read_json(origin.model_dir / "config.json")
    with CheckpointWriter(out_dir, hf_config, companion_files(origin.model_dir), extra) as writer:
        for name, stored in iterate_tensors(headers):
            layer = session.layers.get(name.removesuffix(WEIGHT_SUFFIX)) if name.endswith(WEIGHT_SUFFIX) else None
            solved = others.get(name) if layer is None else layer.solution().weight
            writer.add(name, stored if solved is None else solved.to("cpu", stored.dtype))
    return DenseReport(writer.total_bytes)


@torch.no_grad()
def write_sliced(
    session: Session, origin: Origin, out_dir: Path, extra: Mapping[str, Any]
) -> slice_module.ShrinkReport:
    """The model without the units that the method removes, with what it trained folded into what stays."""
    solved = {name: layer.solution().weight for name, layer in session.layers.items()}
    weights = {name: weight for name, weight in solved.items() if weight is not None}
    kept = session.method.kept_units(session.layers)
    others = _others(session, read_headers(origin.model_dir))
    return slice_module.write(origin.model_dir, out_dir, weights, kept, extra, others)


def check(session: Session, model_dir: Path) -> None:
    """Raise now, before any training, the `ModelError` that writing what `session` learns would end in."""
    headers = read_headers(model_dir)
    _others(session, headers)
    for name in session.layers:
        if name + WEIGHT_SUFFIX not in headers:
            raise ModelError(f"{model_dir}: stores no tensor {name + WEIGHT_SUFFIX}, which the result is to replace")
    if session.method.result is Result.SLICED:
        slice_module.check(model_dir, session.method.kept_units(session.layers))


def _replaced(session: Session, origin: Origin, headers: Mapping[str, TensorHeader]) -> dict[str, Tensor]:
    """Tensors of no replaced layer that are not the dense model's: trained now, or before in what training went on
    from."""
    earlier = {} if origin.start is None else origin.start.changed
    return {**earlier, **_others(session, headers)}


def _others(session: Session, headers: Mapping[str, TensorHeader]) -> dict[str, Tensor]:
    """Trained tensors by their stored names, but for the weights of replaced layers. `ModelError` if one has none.

    A tensor of several names (a tied head) goes by the first of them here.
    """
    found: dict[str, Tensor] = {}
    modules = {
        name.rpartition(".")[0]
        for name, stored in session.stored.items()
        if stored.rpartition(".")[0] in session.layers
    }
    for name, tensor in trained_tensors(session).items():
        module, _, kind = name.rpartition(".")
        if module in modules and kind != "bias":
            continue
        stored = session.stored.get(name, name)
        if stored not in headers:
            raise ModelError(
                f"{name} is to be trained, but the model directory stores it in other tensors; train what is pruned "
                "only (train.scope = 'targets')"
            )
        found[stored] = tensor
    return found
