"""Sparse checkpoint with float values -> the same with values of 8 or 4 bits, streamed.

For 2:4 and 8 bits that is 4 + 1 bits per weight instead of 8 + 1: 0.3125 of the dense 16-bit bytes, and four more bytes
per row for its scale; with 4 bits 2 + 1, and four bytes for each group of kept values. Quantising comes after the mask
and looks at kept values only, so every pruned entry is exactly zero before and after, and the masks, their digest and
everything downstream of it stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from maskgen.core import layout
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.companions import check_companions, companion_files
from maskgen.core.config import sparse_hf_config
from maskgen.core.errors import FormatError, clip
from maskgen.core.packed import StoredLayer
from maskgen.core.values import CODE_DTYPES, FLOAT
from maskgen.core.writer import SHARD_BYTES, CheckpointWriter
from maskgen.export.allocation import Allocation, read_allocation, stored_allocation
from maskgen.export.compress import CompressReport, stored_modules


def quantise(
    sparse_dir: Path,
    out_dir: Path,
    values: str,
    group: int | None = None,
    coded: Callable[[str], StoredLayer] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> CompressReport:
    """Write a sparse checkpoint with float values again with codes (`int8`, `fp8_e4m3`, or `int4`, of which `group`
    share a scale): each value rounded to the nearest, or the layers with codes that `coded` gives by name, with their
    corrections.

    Masks and every other tensor stay as they are. Raises `FormatError` if the values are quantised
    already: a second rounding would only add error.
    """
    checkpoint = check(sparse_dir, values)
    check_companions(sparse_dir)
    config = replace(checkpoint.config, values=values, group=group)
    hf_config = sparse_hf_config(checkpoint.hf_config, config)
    sizes = {"dense": 0, "packed": 0}
    extra = stored_allocation(_resized(checkpoint, values, group))
    with CheckpointWriter(out_dir, hf_config, companion_files(sparse_dir), extra, shard_bytes) as writer:
        for name, module in stored_modules(checkpoint):
            if module is None:
                writer.add(name, checkpoint.tensor(name))
                continue
            layer = checkpoint.layer(module)
            stored = StoredLayer(layer.packed.quantised(values, group), layer.correction)
            if coded is not None:
                stored = coded(module)
            sizes["dense"] += layer.packed.dense_nbytes(layer.packed.values.dtype)
            sizes["packed"] += stored.nbytes
            for suffix, tensor in layout.tensors(stored).items():
                writer.add(module + suffix, tensor)
    return CompressReport(len(config.targets), sizes["dense"], sizes["packed"], writer.total_bytes)


def check(sparse_dir: Path, values: str) -> SparseCheckpoint:
    """The checkpoint, if its values can become codes of the kind `values`; `FormatError` if not."""
    checkpoint = SparseCheckpoint.open(sparse_dir)
    if values == FLOAT or checkpoint.config.values != FLOAT:
        raise FormatError(
            f"{sparse_dir}: values {checkpoint.config.values} cannot become {clip(values)}; quantise float values to "
            f"{' or '.join(CODE_DTYPES)}"
        )
    return checkpoint


def _resized(checkpoint: SparseCheckpoint, values: str, group: int | None) -> Allocation | None:
    """How a budget was spent on it, with the bytes that its layers take with `values`; None without a budget."""
    allocation = read_allocation(checkpoint.path)
    if allocation is None:
        return None
    layers = {name: checkpoint.layer(name) for name in checkpoint.config.targets}
    sizes = {
        name: StoredLayer(layer.packed.quantised(values, group), layer.correction).nbytes
        for name, layer in layers.items()
    }
    return allocation.stored_as(sizes)
