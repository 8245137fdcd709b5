"""Checkpoints of other tools -> sparse checkpoint: masked-dense directories, `sparse-24-bitmask` and `marlin-24` of
compressed-tensors, and MaskLLM's masks with the dense model they are for. A sparse checkpoint of ours is written again,
in the newest version of the format.

Two passes, each with one layer in memory: the first reads every layer that engines can serve packed, checks it, and
keeps the mask (a bit per weight); the second writes. Layers that do not follow the pattern stay dense, and so do those
that engines serve as one with such a layer. Codes stay codes if all layers have those of one kind and a scale for each
row; otherwise they become floats, since one checkpoint has one kind of values.

Nothing says what the model was before it was pruned, so `base_model` of the result is the directory that was converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from maskgen.core import layout
from maskgen.core.checkpoint import WEIGHT_SUFFIX, SparseCheckpoint, is_sparse_checkpoint, read_headers
from maskgen.core.companions import ALLOCATION_FILE, check_companions, companion_files
from maskgen.core.config import CONFIG_KEY, SparseConfig, dense_hf_config, sparse_hf_config
from maskgen.core.digest import digest_file, digest_json, digest_weights
from maskgen.core.errors import FormatError, ModelError, clip
from maskgen.core.files import read_json
from maskgen.core.mask import MaskSet
from maskgen.core.packed import PackedTensor, StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.core.quality import QUALITY_FILE
from maskgen.core.sizes import check_dimensions
from maskgen.core.values import FLOAT, from_codes
from maskgen.core.writer import SHARD_BYTES, CheckpointWriter
from maskgen.export.compress import model_label
from maskgen.export.foreign import FLOATS, ForeignLayer, Source
from maskgen.export.foreign.compressed_tensors import check_section
from maskgen.export.foreign.find import find_layers
from maskgen.export.foreign.masked import CODES
from maskgen.export.foreign.maskllm import MaskArchive
from maskgen.hf import model, planning

NOT_FOLLOWED, NOT_ALL = "does not follow {}", "served as one with {}, which does not follow {}"


@dataclass(frozen=True)
class ConvertReport:
    """What was found and written.

    `dense` maps layers that could be sparse and are stored dense to the reason, `notes` say what became of things that
    this format does not have. `source_bytes` are the files of weights, `total_bytes` all tensors written.
    """

    found: str
    targets: int
    values: str
    dense: Mapping[str, str]
    notes: Sequence[str]
    source_bytes: int
    total_bytes: int


def convert(
    model_dir: Path,
    out_dir: Path,
    pattern: NMPattern,
    masks: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    tell: Callable[[str], None] = lambda what: None,
) -> ConvertReport:
    """Write the sparse checkpoint `out_dir`. `pattern` is that of masked weights; the other formats are 2:4.

    `tell` is called with what begins. Raises `FormatError` for what is damaged or not known, `ModelError` where no
    layer follows the pattern, `OutputExistsError`.
    """
    check_companions(model_dir)
    if masks is None and is_sparse_checkpoint(model_dir):
        return _again(SparseCheckpoint.open(model_dir), out_dir, shard_bytes)
    hf_config = read_json(model_dir / "config.json")
    notes = check_section(hf_config, f"{model_dir / 'config.json'}") if CONFIG_KEY in hf_config else []
    source = Source(model_dir, hf_config, read_headers(model_dir))
    archive = None if masks is None else MaskArchive(masks)
    layers = find_layers(source, pattern, archive)
    plan = _plan(source, layers, pattern)
    _check_stored(source, layers, plan)
    work = _Work(source, layers)
    tell("reading")
    masked = work.read([name for block in plan.targets for name in block])
    dense = _not_sparse(plan, masked, pattern)
    targets = {name: bitmask for name, bitmask in masked.items() if bitmask is not None and name not in dense}
    if not targets:
        name, why = next(iter(dense.items()))
        raise ModelError(
            f"{model_dir}: nothing to convert: of {len(dense)} layers none is sparse, such as {name}: {why}; prune it "
            "with maskgen run, or serve it as it is"
        )
    mask_set = MaskSet(pattern, targets, digest_weights(model_dir), _recipe_digest(masks))
    config = SparseConfig(
        pattern=pattern,
        targets=mask_set.names,
        ignored=tuple(sorted({*plan.listed, *dense} - set(targets))),
        mask_digest=mask_set.digest(),
        recipe_digest=mask_set.recipe_digest,
        base_model=model_label(model_dir),
        base_digest=mask_set.base_digest,
        values=work.values(targets),
    )
    work.check_others(config)
    tell("writing")
    total_bytes = work.write(out_dir, config, shard_bytes)
    source_bytes = sum(header.path.stat().st_size for header in {h.path: h for h in source.headers.values()}.values())
    found = layers[next(iter(targets))].FOUND
    notes += work.notes(config)
    return ConvertReport(found, len(targets), config.values, dense, notes, source_bytes, total_bytes)


class _Work:
    """Both passes over the layers."""

    def __init__(self, source: Source, layers: Mapping[str, ForeignLayer]) -> None:
        self.source, self.layers = source, layers
        self.kinds: dict[str, str] = {}
        self.owners = {name: layer for layer in layers.values() for name in layer.tensors}

    def read(self, names: Sequence[str]) -> dict[str, Tensor | None]:
        """The masks of layers; None of one that does not follow the pattern."""
        found: dict[str, Tensor | None] = {}
        for name in names:
            packed = self.layers[name].packed()
            found[name] = None if packed is None else packed.bitmask
            if packed is not None:
                self.kinds[name] = packed.kind
        return found

    def values(self, targets: Mapping[str, Tensor]) -> str:
        """The kind of values that all targets can have."""
        kinds = {self.kinds[name] for name in targets}
        return kinds.pop() if len(kinds) == 1 else FLOAT

    def notes(self, config: SparseConfig) -> list[str]:
        """What became of codes that this format does not have."""
        dtype = str(self.source.dtype).removeprefix("torch.")
        loose = [name for name in config.targets if self.layers[name].BECOMES_FLOATS and self.kinds[name] == FLOAT]
        notes = [f"4-bit codes with a scale for 128 inputs are stored as {dtype}, not as int4 values"] if loose else []
        if any(self.kinds[name] != config.values for name in config.targets):
            notes.append(f"some layers have 8-bit codes and others have not, so all are stored as {dtype}")
        return notes

    def check_others(self, config: SparseConfig) -> None:
        """`FormatError` for a tensor of no layer that would be one of a layer in what is written."""
        expected, targets = layout.suffixes(config), set(config.targets)
        for name, header in self.source.headers.items():
            module, _, last = name.rpartition(".")
            taken = layout.EVERY_SUFFIX if module in targets else expected
            if name not in self.owners and f".{last}" in taken:
                raise FormatError(
                    f"{self.source.path}: tensor {clip(name)}, {header.dtype} {clip(list(header.shape))}, belongs to "
                    "no layer as this model stores them, but would to one in a sparse checkpoint; expected no tensor "
                    "of that name: remove it, or download the model again"
                )

    def write(self, out_dir: Path, config: SparseConfig, shard_bytes: int) -> int:
        """Write everything; bytes of all tensors."""
        targets, written = set(config.targets), set()
        hf_config = sparse_hf_config(self.source.hf_config, config)
        companions = companion_files(self.source.path)
        with CheckpointWriter(out_dir, hf_config, companions, shard_bytes=shard_bytes) as writer:
            for name in sorted(self.source.headers, key=lambda name: (self.source.headers[name].path, name)):
                layer = self.owners.get(name)
                if layer is None:
                    writer.add(name, self.source.tensor(name))
                elif layer.name not in written:
                    written.add(layer.name)
                    self._add(writer, layer, config.values, layer.name in targets)
        return writer.total_bytes

    def _add(self, writer: CheckpointWriter, layer: ForeignLayer, values: str, is_target: bool) -> None:
        if not is_target:
            writer.add(layer.name + WEIGHT_SUFFIX, layer.dense())
            return
        packed = layer.packed()
        assert packed is not None, layer.name
        if packed.kind != values:
            assert packed.scale is not None
            packed = PackedTensor(
                from_codes(packed.values, packed.scale).to(self.source.dtype), packed.bitmask, packed.pattern
            )
            packed.verify(layer.name)
        for suffix, tensor in layout.tensors(StoredLayer(packed)).items():
            writer.add(layer.name + suffix, tensor)


def _plan(source: Source, layers: Mapping[str, ForeignLayer], pattern: NMPattern) -> planning.Plan:
    shapes = _dense_shapes(source, layers)
    check_dimensions(source.path, source.hf_config, shapes)
    return planning.plan(model.outline(source.path), pattern, shapes=shapes)


def _check_stored(source: Source, layers: Mapping[str, ForeignLayer], plan: planning.Plan) -> None:
    """`FormatError` for the weight of a layer that engines serve packed, where no way to store one is known for it."""
    for name in (name for block in plan.targets for name in block if name not in layers):
        header = source.header(name + WEIGHT_SUFFIX)
        raise FormatError(
            f"{header.path}: {name} is stored as {header.dtype} {clip(list(header.shape))}, expected a matrix of "
            f"{', '.join((*FLOATS, *CODES))}; load the model with AutoModelForCausalLM in bfloat16, save_pretrained it "
            "in another directory, and convert that"
        )


def _dense_shapes(source: Source, layers: Mapping[str, ForeignLayer]) -> dict[str, tuple[int, ...]]:
    """The tensors that the directory would have if it were dense."""
    owned = {name for layer in layers.values() for name in layer.tensors}
    shapes = {name: header.shape for name, header in source.headers.items() if name not in owned}
    return shapes | {name + WEIGHT_SUFFIX: layer.shape for name, layer in layers.items()}


def _not_sparse(plan: planning.Plan, masked: Mapping[str, Tensor | None], pattern: NMPattern) -> dict[str, str]:
    """The layers that could be sparse and are not, and why."""
    reasons = {name: NOT_FOLLOWED.format(pattern) for name, bitmask in masked.items() if bitmask is None}
    for name in list(reasons):
        parent, _, leaf = name.rpartition(".")
        for group in plan.groups:
            for part in group if leaf in group else ():
                if f"{parent}.{part}" in masked:
                    reasons.setdefault(f"{parent}.{part}", NOT_ALL.format(leaf, pattern))
    return reasons


def _recipe_digest(masks: Path | None) -> str:
    return digest_json({"convert": "sparse_nm", "masks": None if masks is None else digest_file(masks)})


def _again(checkpoint: SparseCheckpoint, out_dir: Path, shard_bytes: int) -> ConvertReport:
    """Write a sparse checkpoint as it is, with digests of what is there."""
    config = checkpoint.config
    hf_config = sparse_hf_config(dense_hf_config(checkpoint.hf_config), replace(config, shards=None))
    records = (checkpoint.path / name for name in (QUALITY_FILE, ALLOCATION_FILE))
    extra = {path.name: path for path in records if path.is_file()}
    with CheckpointWriter(out_dir, hf_config, companion_files(checkpoint.path), extra, shard_bytes) as writer:
        for name in checkpoint.headers:
            writer.add(name, checkpoint.tensor(name))
    return ConvertReport(
        "sparse_nm", len(config.targets), config.values, {}, [], writer.total_bytes, writer.total_bytes
    )
