"""Reports about a model directory: for every layer, whether it follows an N:M pattern and how many bytes it takes.

Zeros in a dense file save nothing, and a single group with three non-zeros keeps a layer off the sparse kernels. Works
on sparse checkpoints (verified in full) and on ordinary Hugging Face directories, without loading the model.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.checkpoint import WEIGHT_SUFFIX, SparseCheckpoint, is_sparse_checkpoint, iterate_tensors, read_headers
from maskgen.core.layout import suffixes
from maskgen.core.pattern import NMPattern
from maskgen.core.quality import Quality, known_quality
from maskgen.core.settings import check_settings
from maskgen.core.values import FLOAT
from maskgen.export.allocation import Allocation, dense_layers, read_allocation
from maskgen.hf.dense import KeptDense, Rules, kept_in_checkpoint


@dataclass(frozen=True)
class LayerReport:
    """One weight matrix `[out_features, in_features]`.

    `stored` is "packed" or "dense". `follows` says whether no group of `m` columns has more than `n` non-zeros. `zeros`
    is the fraction of zeros. `dense_bytes` is what the dense weight takes, `stored_bytes` what is stored of it, scales
    and correction included; `correction_bytes` is the part of the correction.
    """

    name: str
    out_features: int
    in_features: int
    stored: str
    follows: bool
    zeros: float
    dense_bytes: int
    stored_bytes: int
    correction_bytes: int = 0


@dataclass(frozen=True)
class InspectReport:
    """All weight matrices of a directory, embeddings too, and the bytes of everything else (norms, biases).

    `pattern` is what layers are compared with. `kept` says what of the decoder blocks of a sparse checkpoint is dense,
    experts too, and why. `compressed` says whether the directory is a sparse checkpoint, and then `values` how packed
    weights are stored: `float`, `int8`, `fp8_e4m3`, or `int4`, of which `group` share a scale (None: those of a row).
    `quality` is what was measured when the model was made, if that is known, and `allocation` how a budget was spent.
    `correction` is the form of the corrections as the manifest states it, None without any. `digests` is how many
    shards were found to have the digest that the manifest states; 0 where it states none. `settings` is how many files,
    `config.json` among them, were found to be as they were written; 0 where there is no record of them.
    """

    path: str
    pattern: str
    compressed: bool
    layers: list[LayerReport]
    other_bytes: int
    values: str = FLOAT
    kept: list[KeptDense] = field(default_factory=list)
    quality: Quality | None = None
    allocation: Allocation | None = None
    correction: Mapping[str, Any] | None = None
    digests: int = 0
    settings: int = 0
    group: int | None = None

    @property
    def packed_layers(self) -> list[LayerReport]:
        """Layers stored as values + bitmask."""
        return [layer for layer in self.layers if layer.stored == "packed"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        spent = None if self.allocation is None else self.allocation.model_dump(mode="json")
        return {**asdict(replace(self, allocation=None)), "allocation": spent}


def inspect(path: Path, pattern: NMPattern | None = None) -> InspectReport:
    """Read every weight matrix of a model directory and report on it.

    `pattern` is what the layers of a dense directory are compared with (default 2:4); a sparse checkpoint has its own.
    Raises `FormatError` for a damaged directory, for a shard whose digest is not that of the manifest, and for a key of
    `config.json` or a file beside it that is not as it was written.
    """
    if is_sparse_checkpoint(path):
        checkpoint = SparseCheckpoint.open(path)
        if checkpoint.config.shards is not None:
            checkpoint.verify_digests()
        record = check_settings(path)
        return replace(_inspect_sparse(checkpoint), settings=0 if record is None else 1 + len(record.files))
    pattern = pattern or NMPattern(2, 4)
    layers, other_bytes = [], 0
    for name, tensor in iterate_tensors(read_headers(path)):
        if name.endswith(WEIGHT_SUFFIX) and tensor.ndim == 2:
            layers.append(_dense_layer(name.removesuffix(WEIGHT_SUFFIX), tensor, pattern))
        else:
            other_bytes += tensor.nbytes
    return InspectReport(str(path), str(pattern), False, layers, other_bytes, quality=known_quality(path))


def _inspect_sparse(checkpoint: SparseCheckpoint) -> InspectReport:
    pattern = checkpoint.config.pattern
    layers = list(_packed_layers(checkpoint))
    packed_names, own = {layer.name for layer in layers}, suffixes(checkpoint.config)
    other_bytes = 0
    for name in checkpoint.headers:
        module, _, suffix = name.rpartition(".")
        if module in packed_names and "." + suffix in own:
            continue
        tensor = checkpoint.tensor(name)
        if suffix == "weight" and tensor.ndim == 2:
            layers.append(_dense_layer(module, tensor, pattern))
        else:
            other_bytes += tensor.nbytes
    shapes = {name: header.shape for name, header in checkpoint.headers.items()}
    targets = {layer.name: (layer.out_features, layer.in_features) for layer in layers if layer.stored == "packed"}
    others = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in targets}
    allocation = read_allocation(checkpoint.path)
    kept = kept_in_checkpoint(others, targets, Rules.of(pattern, checkpoint.hf_config), dense_layers(allocation))
    quality, values, form = known_quality(checkpoint.path), checkpoint.config.values, checkpoint.config.correction
    return InspectReport(
        str(checkpoint.path),
        str(pattern),
        True,
        layers,
        other_bytes,
        values,
        kept,
        quality,
        allocation,
        correction=None if form is None else form.to_dict(),
        digests=len(checkpoint.config.shards or ()),
        group=checkpoint.config.group,
    )


def _packed_layers(checkpoint: SparseCheckpoint) -> Iterator[LayerReport]:
    for name in checkpoint.config.targets:
        layer = checkpoint.layer(name)
        packed = layer.packed
        count = packed.shape[0] * packed.shape[1]
        zeros = 1.0 - int(packed.kept.count_nonzero()) / count
        dense_bytes = packed.dense_nbytes(checkpoint.weight_dtype(name))
        correction_bytes = 0 if layer.correction is None else layer.correction.nbytes
        yield LayerReport(name, *packed.shape, "packed", True, zeros, dense_bytes, layer.nbytes, correction_bytes)


def _dense_layer(name: str, weight_OI: Tensor, pattern: NMPattern) -> LayerReport:
    nonzero_OI = weight_OI.ne(0)
    zeros = 1.0 - int(nonzero_OI.sum()) / nonzero_OI.numel()
    follows = weight_OI.shape[1] % pattern.m == 0 and _most_in_group(nonzero_OI, pattern) <= pattern.n
    out_features, in_features = weight_OI.shape
    return LayerReport(name, out_features, in_features, "dense", follows, zeros, weight_OI.nbytes, weight_OI.nbytes)


def _most_in_group(nonzero_OI: Tensor, pattern: NMPattern) -> int:
    nonzero_OGm = nonzero_OI.reshape(nonzero_OI.shape[0], -1, pattern.m)
    return int(nonzero_OGm.sum(-1, dtype=torch.uint8).max())
