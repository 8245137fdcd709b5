"""Dense directory + masks -> sparse checkpoint, and back.

Compression streams: shards of the dense model are read one tensor at a time and written by `CheckpointWriter`, so the
peak is one output shard plus one weight, whatever the size of the model. Weights come either from the dense model (a
`MaskSet`, for methods that only choose a mask) or already packed (methods that also changed the kept values, or added a
correction). The manifest decides how values are stored: what arrives as floats is quantised on the way out.

The way back is exact in what it can be: a sparse weight comes back bit for bit, 8-bit values as the floats they stand
for, and a correction y += S (X x) is folded into one dense weight mask * W + S X, which is then sparse no more.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from maskgen.core import layout
from maskgen.core.checkpoint import (
    VALUES_SUFFIX,
    WEIGHT_SUFFIX,
    SparseCheckpoint,
    TensorHeader,
    iterate_tensors,
    read_dense_config,
    read_headers,
)
from maskgen.core.companions import check_companions, companion_files
from maskgen.core.config import SparseConfig, dense_hf_config, sparse_hf_config
from maskgen.core.correction import CorrectionConfig
from maskgen.core.digest import digest_weights
from maskgen.core.errors import FormatError, ModelError, NumericalError, clip
from maskgen.core.mask import BITMASK_SUFFIX, MaskSet
from maskgen.core.packed import Correction, PackedTensor, StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.core.sizes import check_dimensions
from maskgen.core.values import FLOAT
from maskgen.core.writer import SHARD_BYTES, CheckpointWriter

Pack = Callable[[str, Tensor], StoredLayer]
"""Module name and dense weight `[O, I]` -> what to store of the layer."""


@dataclass(frozen=True)
class CompressReport:
    """Bytes of the targets' weights before and after (scales and corrections included), and of all tensors after."""

    targets: int
    dense_target_bytes: int
    packed_target_bytes: int
    total_bytes: int

    @property
    def ratio(self) -> float:
        """Packed over dense bytes of the target weights; 0.5625 for 2:4 in 16 bits, about 0.3125 with int8 values."""
        return self.packed_target_bytes / self.dense_target_bytes


def compress_masks(
    model_dir: Path,
    masks: MaskSet,
    out_dir: Path,
    ignored: tuple[str, ...] = (),
    shard_bytes: int = SHARD_BYTES,
    values: str = FLOAT,
    group: int | None = None,
) -> CompressReport:
    """Write the dense model of `model_dir` with masks applied as a sparse checkpoint.

    `ignored` are the linear layers that stay dense; `values` is how kept weights are stored (`float`, `int8`,
    `fp8_e4m3`, `int4`, of which `group` share a scale). Raises `FormatError` when the masks were made for other
    weights, and whatever `compress` raises.
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
        values=values,
        group=group,
    )

    def pack(name: str, weight_OI: Tensor) -> StoredLayer:
        return StoredLayer(PackedTensor.pack(weight_OI, masks.mask(name), masks.pattern, name))

    return compress(model_dir, config, pack, out_dir, shard_bytes=shard_bytes)


def compress(
    model_dir: Path,
    config: SparseConfig,
    pack: Pack,
    out_dir: Path,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    others: Mapping[str, Tensor] | None = None,
) -> CompressReport:
    """Write `out_dir`: every tensor of `model_dir`, with the weights of `config.targets` replaced by `pack`'s result.

    `pack` returns float values of the weight's own dtype, which are quantised here if `config.values` says so, or codes
    of that kind; `config.correction` is the form of the correction that comes with every layer. `others` replaces
    tensors that belong to no target (norms and embeddings that were trained too), by name, of the same shape, cast to
    the stored dtype. `extra` maps names of further JSON files to their values (the resolved recipe). Raises
    `ModelError` for targets and others that are not in the model, `OutputExistsError`, and whatever `pack` raises; then
    nothing is left behind.
    """
    reserved = layout.suffixes(config)
    hf_config, headers = check_source(model_dir, config.pattern, config.targets, config.ignored, reserved)
    others = others or {}
    _check_others(model_dir, config, others, headers)
    sizes = {"dense": 0, "packed": 0}
    targets = set(config.targets)
    with CheckpointWriter(
        out_dir, sparse_hf_config(hf_config, config), companion_files(model_dir), extra, shard_bytes
    ) as writer:
        for name, tensor in iterate_tensors(headers):
            module = name.removesuffix(WEIGHT_SUFFIX)
            if module == name or module not in targets:
                writer.add(name, others[name].detach().to("cpu", tensor.dtype) if name in others else tensor)
                continue
            stored = _stored(module, tensor, pack(module, tensor), config)
            sizes["dense"] += tensor.nbytes
            sizes["packed"] += stored.nbytes
            for suffix, part in layout.tensors(stored).items():
                writer.add(module + suffix, part)
    return CompressReport(len(targets), sizes["dense"], sizes["packed"], writer.total_bytes)


def check_source(
    model_dir: Path,
    pattern: NMPattern,
    targets: Iterable[str],
    ignored: Iterable[str],
    reserved: tuple[str, ...] = (VALUES_SUFFIX, BITMASK_SUFFIX),
) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """Check everything about a dense model directory that `compress` depends on, without reading a weight.

    `targets` are the layers to be sparse and `ignored` those to stay dense, `reserved` the suffixes of tensor names
    that packed weights need. Returns the directory's `config.json` and tensor headers. Raises `FormatError` and
    `ModelError`.
    """
    hf_config, headers = read_dense_config(model_dir), read_headers(model_dir)
    check_dimensions(model_dir, hf_config, {name: header.shape for name, header in headers.items()})
    _check_targets(model_dir, pattern, targets, headers)
    for module in ignored:
        if module + WEIGHT_SUFFIX not in headers and not module.endswith("lm_head"):
            raise ModelError(f"{model_dir}: no tensor {module}{WEIGHT_SUFFIX}, though {module} is to be kept dense")
    for name in headers:
        if name.endswith(reserved):
            raise ModelError(
                f"{model_dir}: tensor {clip(name)}: {' and '.join(reserved)} are reserved for packed weights; this "
                "model cannot be stored sparse"
            )
    return hf_config, headers


def decompress(sparse_dir: Path, out_dir: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the dense model that computes the same: a stock Hugging Face directory any tool reads. Returns its bytes.

    Its weights are masked ones, unless the checkpoint has corrections, which are folded in. Values of 8 bits come back
    in the dtype `config.json` names (`SparseCheckpoint.weight_dtype`).
    """
    checkpoint = SparseCheckpoint.open(sparse_dir)
    check_companions(sparse_dir)
    with CheckpointWriter(
        out_dir, dense_hf_config(checkpoint.hf_config), companion_files(sparse_dir), shard_bytes=shard_bytes
    ) as writer:
        for name, module in stored_modules(checkpoint):
            if module is None:
                writer.add(name, checkpoint.tensor(name))
            else:
                writer.add(module + WEIGHT_SUFFIX, checkpoint.layer(module).dense(checkpoint.weight_dtype(module)))
    return writer.total_bytes


def load_masks(path: Path) -> MaskSet:
    """A `MaskSet` from a mask file or from a sparse checkpoint directory."""
    if path.is_dir():
        return SparseCheckpoint.open(path).mask_set()
    return MaskSet.load(path)


def model_label(model_dir: Path) -> str:
    """The name of the model's directory, without the path to it, as a label for people."""
    return model_dir.resolve().name or "model"


def stored_modules(checkpoint: SparseCheckpoint) -> Iterator[tuple[str, str | None]]:
    """(name, None) for each stored tensor that belongs to no target, and (name of its values, module) for each
    target."""
    own, targets = layout.suffixes(checkpoint.config), set(checkpoint.config.targets)
    for name in checkpoint.headers:
        module, _, suffix = name.rpartition(".")
        if module not in targets or "." + suffix not in own:
            yield name, None
        elif "." + suffix == VALUES_SUFFIX:
            yield name, module


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


def _check_others(
    model_dir: Path, config: SparseConfig, others: Mapping[str, Tensor], headers: Mapping[str, TensorHeader]
) -> None:
    weights = {module + WEIGHT_SUFFIX for module in config.targets}
    for name, tensor in others.items():
        header = None if name in weights else headers.get(name)
        if header is None or tuple(tensor.shape) != header.shape:
            stored = "no tensor of that name besides the targets" if header is None else f"shape {header.shape}"
            raise ModelError(f"{model_dir}: {clip(name)} {tuple(tensor.shape)} is to be replaced, but it has {stored}")


def _stored(module: str, weight_OI: Tensor, layer: StoredLayer, config: SparseConfig) -> StoredLayer:
    """The layer as it is written: checked against the weight it replaces and the manifest, and quantised."""
    packed = layer.packed
    is_coded = packed.kind == config.values != FLOAT
    if packed.shape != tuple(weight_OI.shape) or not (is_coded or packed.values.dtype == weight_OI.dtype):
        raise ModelError(
            f"{module}: packed weight {packed.values.dtype} {packed.shape} replaces a weight {weight_OI.dtype} "
            f"{tuple(weight_OI.shape)}; dtype and shape must not change"
        )
    correction = None if layer.correction is None else layer.correction.to(weight_OI.dtype)
    _check_correction(module, packed.shape, correction, config.correction)
    return StoredLayer(packed.quantised(config.values, config.group), correction)


def _check_correction(
    module: str, shape: tuple[int, int], correction: Correction | None, form: CorrectionConfig | None
) -> None:
    expected = None if form is None else form.shapes(*shape, module)
    found = None
    if correction is not None:
        found = list(correction.out.shape), None if correction.pool is None else list(correction.pool.shape)
        if not correction.is_finite:
            raise NumericalError(f"{module}: the correction holds NaN or infinity")
    if found != expected:
        raise ModelError(f"{module}: correction of shapes {found}, but the manifest's {form} implies {expected}")
