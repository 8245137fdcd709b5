"""Which tensors a checkpoint stores for a target layer: their names, dtypes and shapes, checked from headers alone.

    T.values   T.bitmask                    always
    T.scale                                 if the values are codes of 8 or 4 bits
    T.correction_out   T.correction_pool    if there is a correction y += S (X x); the second if X is stored

All targets of a checkpoint store the same kinds of tensors; the manifest says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from maskgen.core.config import CONFIG_KEY, SparseConfig
from maskgen.core.correction import CorrectionConfig
from maskgen.core.errors import FormatError, clip
from maskgen.core.int4 import check_even, scale_shape
from maskgen.core.mask import BITMASK_SUFFIX
from maskgen.core.packed import Correction, PackedTensor, StoredLayer, check_shapes
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, FP8, INT4, INT8, nbytes_of, per_byte

WEIGHT_SUFFIX = ".weight"
VALUES_SUFFIX = ".values"
SCALE_SUFFIX = ".scale"
OUT_SUFFIX = ".correction_out"
POOL_SUFFIX = ".correction_pool"

_FLOATS = ("BF16", "F16", "F32")
_VALUE_DTYPES = {FLOAT: _FLOATS, INT8: ("I8",), FP8: ("F8_E4M3",), INT4: ("U8",)}
EVERY_SUFFIX = (VALUES_SUFFIX, BITMASK_SUFFIX, SCALE_SUFFIX, OUT_SUFFIX, POOL_SUFFIX, WEIGHT_SUFFIX)


@dataclass(frozen=True)
class LayerForm:
    """What is stored of every target layer: `values` is `float`, `int8`, `fp8_e4m3`, or `int4` of which `group` share a
    scale (None: those of a row); `correction` None for none."""

    pattern: NMPattern
    values: str = FLOAT
    correction: CorrectionConfig | None = None
    group: int | None = None

    def packed_nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes of the bit mask, kept values and scales of a weight `[rows, columns]`, without a correction.

        `itemsize` is that of a float value.
        """
        kept = self.pattern.kept_columns(columns)
        return rows * columns // 8 + nbytes_of(self.values, rows, kept, itemsize, self.group)


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor is and what it is, known without reading it. `dtype` is the safetensors name, such as `BF16`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def suffixes(config: SparseConfig | LayerForm) -> tuple[str, ...]:
    """Suffixes of the tensors that every target has, in the order they are written."""
    names = [VALUES_SUFFIX, BITMASK_SUFFIX]
    if config.values != FLOAT:
        names.append(SCALE_SUFFIX)
    if config.correction is not None:
        names += [OUT_SUFFIX, POOL_SUFFIX] if config.correction.stores_pool else [OUT_SUFFIX]
    return tuple(names)


def tensors(layer: StoredLayer) -> dict[str, Tensor]:
    """Every tensor of a layer by suffix, in the order they are written."""
    packed, correction = layer.packed, layer.correction
    tensor_of = {
        VALUES_SUFFIX: packed.values,
        BITMASK_SUFFIX: packed.bitmask,
        SCALE_SUFFIX: packed.scale,
        OUT_SUFFIX: None if correction is None else correction.out,
        POOL_SUFFIX: None if correction is None else correction.pool,
    }
    return {suffix: tensor for suffix, tensor in tensor_of.items() if tensor is not None}


def read_layer(read: Callable[[str], Tensor], config: SparseConfig | LayerForm) -> StoredLayer:
    """Make a layer from its tensors; `read` is called with each suffix that `config` implies and returns that
    tensor."""
    stored = {suffix: read(suffix) for suffix in suffixes(config)}
    packed = PackedTensor(stored[VALUES_SUFFIX], stored[BITMASK_SUFFIX], config.pattern, stored.get(SCALE_SUFFIX))
    if OUT_SUFFIX not in stored:
        return StoredLayer(packed)
    return StoredLayer(packed, Correction(stored[OUT_SUFFIX], stored.get(POOL_SUFFIX)))


def check_headers(path: Path, config: SparseConfig, headers: Mapping[str, TensorHeader]) -> None:
    """Raise `FormatError` unless the tensors of a directory are exactly those the manifest implies."""
    expected = suffixes(config)
    for module in config.targets:
        stored = {suffix: headers[module + suffix] for suffix in EVERY_SUFFIX if module + suffix in headers}
        if set(stored) != set(expected):
            raise FormatError(
                f"{path}: target {module}: expected exactly {', '.join(expected)}, found "
                f"{[module + suffix for suffix in stored]}"
            )
        _check_target(f"{path}: {module}", config, stored)
    targets = set(config.targets)
    for name in headers:
        module, _, suffix = name.rpartition(".")
        if "." + suffix in expected and module not in targets:
            raise FormatError(f"{path}: tensor {clip(name)} belongs to no target of {CONFIG_KEY}")
    for module in config.ignored:
        if module + WEIGHT_SUFFIX not in headers and not module.endswith("lm_head"):
            raise FormatError(f"{path}: ignored module {module} has no {WEIGHT_SUFFIX} tensor")


def _check_target(where: str, config: SparseConfig, stored: Mapping[str, TensorHeader]) -> None:
    values, bitmask = stored[VALUES_SUFFIX], stored[BITMASK_SUFFIX]
    allowed = _VALUE_DTYPES[config.values]
    if values.dtype not in allowed or bitmask.dtype != "U8":
        raise FormatError(
            f"{where}: values {values.dtype}, bitmask {bitmask.dtype}; expected one of {list(allowed)} and U8"
        )
    in_a_byte = per_byte(config.values)
    if config.values == INT4 and len(bitmask.shape) == 2:
        check_even(config.pattern.kept_columns(bitmask.shape[1] * 8), where)
    check_shapes(list(values.shape), list(bitmask.shape), config.pattern, where, in_a_byte)
    out_features, in_features = bitmask.shape[0], bitmask.shape[1] * 8
    scale = scale_shape(out_features, values.shape[1] * in_a_byte, config.group)
    expected_headers: dict[str, tuple[tuple[str, ...], list[int] | None]] = {SCALE_SUFFIX: (("F32",), scale)}
    if config.correction is not None:
        out_shape, pool_shape = config.correction.shapes(out_features, in_features, where)
        floats = (values.dtype,) if config.values == FLOAT else _FLOATS
        expected_headers |= {OUT_SUFFIX: (floats, out_shape), POOL_SUFFIX: (floats, pool_shape)}
    for suffix, (dtypes, shape) in expected_headers.items():
        header = stored.get(suffix)
        if header is not None and (header.dtype not in dtypes or list(header.shape) != shape):
            raise FormatError(
                f"{where}{suffix}: {header.dtype} {list(header.shape)}, expected {' or '.join(dtypes)} {shape}"
            )
