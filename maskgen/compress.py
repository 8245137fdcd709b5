"""Dense directory + masks -> sparse checkpoint, and back.

Compression streams: shards of the dense model are read one tensor at a time and written by `CheckpointWriter`, so the
peak is one output shard plus one weight, whatever the size of the model. Weights come either from the dense model (a
`MaskSet`, for methods that only choose a mask) or already packed (methods that also changed the kept values).

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from maskgen.core.checkpoint import (
    MISTRAL_CONFIG,
    VALUES_SUFFIX,
    WEIGHT_SUFFIX,
    SparseCheckpoint,
    TensorHeader,
    read_headers,
)
from maskgen.core.config import CONFIG_KEY, SparseConfig
from maskgen.core.digest import digest_weights
from maskgen.core.errors import FormatError, ModelError, clip
from maskgen.core.files import open_tensors, read_json
from maskgen.core.mask import BITMASK_SUFFIX, MaskSet
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.sizes import check_dimensions
from maskgen.core.writer import SHARD_BYTES, CheckpointWriter

_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Files that travel with a model: tokenizer, generation settings, chat template. Never code, never other weights."""

Pack = Callable[[str, Tensor], PackedTensor]
"""Module name and dense weight `[O, I]` -> the packed weight to store."""


@dataclass(frozen=True)
class CompressReport:
    """Bytes of the target weights before and after, and of the whole directory's tensors after."""

    targets: int
    dense_target_bytes: int
    packed_target_bytes: int
    total_bytes: int

    @property
    def ratio(self) -> float:
        """Packed over dense bytes of the target weights; 0.5625 for 2:4 in 16 bits."""
        return self.packed_target_bytes / self.dense_target_bytes


def compress_masks(
    model_dir: Path, masks: MaskSet, out_dir: Path, ignored: tuple[str, ...] = (), shard_bytes: int = SHARD_BYTES
) -> CompressReport:
    """Apply masks to the dense model they were made for.

    Raises `FormatError` when the mask set belongs to other weights: masks are only valid for the weights they saw.
    """
    base_digest = digest_weights(model_dir)
    if base_digest != masks.base_digest:
        raise FormatError(
            f"{model_dir}: digest {base_digest}, but the masks were made for {masks.base_digest}; masks are only valid "
            "for the weights they were chosen for: give that model, or choose masks for this one with `maskgen run`"
        )
    config = SparseConfig(
        pattern=masks.pattern,
        targets=masks.names,
        ignored=ignored,
        mask_digest=masks.digest(),
        recipe_digest=masks.recipe_digest,
        base_model=model_label(model_dir),
        base_digest=base_digest,
    )

    def pack(name: str, weight_OI: Tensor) -> PackedTensor:
        return PackedTensor.pack(weight_OI, masks.mask(name), masks.pattern, name)

    return compress(model_dir, config, pack, out_dir, shard_bytes=shard_bytes)


def compress(
    model_dir: Path,
    config: SparseConfig,
    pack: Pack,
    out_dir: Path,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> CompressReport:
    """Write `out_dir`: every tensor of `model_dir`, with the weights of `config.targets` replaced by `pack`'s result.

    `extra` maps names of further JSON files to their values (the resolved recipe). Raises `ModelError` for targets
    that are not in the model, `OutputExistsError`, and whatever `pack` raises; then nothing is left behind.
    """
    hf_config, headers = check_source(model_dir, config.pattern, config.targets, config.ignored)
    sizes = {"dense": 0, "packed": 0}
    targets = set(config.targets)
    with CheckpointWriter(
        out_dir, {**hf_config, CONFIG_KEY: config.to_dict()}, companion_files(model_dir), extra, shard_bytes
    ) as writer:
        for name, tensor in iterate_tensors(headers):
            module = name.removesuffix(WEIGHT_SUFFIX)
            if module == name or module not in targets:
                writer.add(name, tensor)
                continue
            packed = pack(module, tensor)
            if packed.shape != tuple(tensor.shape) or packed.values.dtype != tensor.dtype:
                raise ModelError(
                    f"{module}: packed weight {packed.values.dtype} {packed.shape} replaces a weight {tensor.dtype} "
                    f"{tuple(tensor.shape)}; dtype and shape must not change"
                )
            sizes["dense"] += tensor.nbytes
            sizes["packed"] += packed.nbytes
            writer.add(module + VALUES_SUFFIX, packed.values)
            writer.add(module + BITMASK_SUFFIX, packed.bitmask)
    return CompressReport(len(targets), sizes["dense"], sizes["packed"], writer.total_bytes)


def check_source(
    model_dir: Path, pattern: NMPattern, targets: Iterable[str], ignored: Iterable[str]
) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """Everything about a dense directory that could make `compress` refuse it, found without reading a weight.

    Returns its `config.json` and its headers. Raises `FormatError` and `ModelError`.
    """
    hf_config = read_json(model_dir / "config.json")
    if CONFIG_KEY in hf_config:
        raise FormatError(f"{model_dir}: config.json already has a {CONFIG_KEY}; start from the dense model")
    headers = read_headers(model_dir)
    check_dimensions(model_dir, hf_config, {name: header.shape for name, header in headers.items()})
    _check_targets(model_dir, pattern, targets, headers)
    for module in ignored:
        if module + WEIGHT_SUFFIX not in headers and not module.endswith("lm_head"):
            raise ModelError(f"{model_dir}: no tensor {module}{WEIGHT_SUFFIX}, though {module} is to be kept dense")
    for name in headers:
        if name.endswith((VALUES_SUFFIX, BITMASK_SUFFIX)):
            raise ModelError(
                f"{model_dir}: tensor {clip(name)}: {VALUES_SUFFIX} and {BITMASK_SUFFIX} are reserved for packed "
                "weights; this model cannot be stored sparse"
            )
    return hf_config, headers


def decompress(sparse_dir: Path, out_dir: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the masked-dense model: a stock Hugging Face directory any tool reads. Returns bytes written."""
    checkpoint = SparseCheckpoint.open(sparse_dir)
    hf_config = {key: value for key, value in checkpoint.hf_config.items() if key != CONFIG_KEY}
    targets = set(checkpoint.config.targets)
    with CheckpointWriter(out_dir, hf_config, companion_files(sparse_dir), shard_bytes=shard_bytes) as writer:
        for name in checkpoint.headers:
            module, _, suffix = name.rpartition(".")
            if module not in targets or "." + suffix not in (VALUES_SUFFIX, BITMASK_SUFFIX):
                writer.add(name, checkpoint.tensor(name))
            elif "." + suffix == VALUES_SUFFIX:
                writer.add(module + WEIGHT_SUFFIX, checkpoint.packed(module).unpack())
    return writer.total_bytes


def load_masks(path: Path) -> MaskSet:
    """A `MaskSet` from a mask file or from a sparse checkpoint directory."""
    if path.is_dir():
        return SparseCheckpoint.open(path).mask_set()
    return MaskSet.load(path)


def companion_files(model_dir: Path) -> list[Path]:
    """Tokenizer and settings files that go with the weights; configurations and weight indices are not among them."""
    return sorted(
        path
        for path in model_dir.iterdir()
        if path.is_file()
        and path.suffix in _COPIED_SUFFIXES
        and path.name not in ("config.json", MISTRAL_CONFIG)
        and not path.name.endswith(".index.json")
    )


def iterate_tensors(headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, one at a time, shard by shard."""
    for path in sorted({header.path for header in headers.values()}):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                yield name, file.get_tensor(name)


def model_label(model_dir: Path) -> str:
    """A label for people that does not leak the directory it was read from."""
    return model_dir.resolve().name or "model"


def _check_targets(
    model_dir: Path, pattern: NMPattern, targets: Iterable[str], headers: Mapping[str, TensorHeader]
) -> None:
    for module in targets:
        header = headers.get(module + WEIGHT_SUFFIX)
        if header is None:
            raise ModelError(
                f"{model_dir}: no tensor {module}{WEIGHT_SUFFIX}, though {module} is to be sparse; if it was saved "
                "under other names, load it with transformers and save_pretrained it again"
            )
        if len(header.shape) != 2:
            raise ModelError(f"{model_dir}: {module}{WEIGHT_SUFFIX} has shape {header.shape}, expected a matrix")
        pattern.check_columns(header.shape[1], module)
