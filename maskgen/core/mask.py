"""Masks as values: bool tensors in memory, bitmasks for a whole model (`MaskSet`), and the file of one.

A mask is never recovered from `weight == 0`: a kept weight may be zero. In memory and in sparse checkpoints it is one
bit per weight, row-major, little-endian (bit j of byte k is column 8k + j), the layout of
`numpy.packbits(bitorder="little")`: it needs no per-pattern code and is checked with a population count.

One dense model may have a mask per domain, so in a `MaskSet` file every bit counts: it stores patterns as digits
(`maskgen.core.digits`: 0.667 bit a weight for 2:4), or the bits of patterns for which that is not smaller (4:8, say).
It is a safetensors file with `<module>.digits` (uint8) and `<module>.shape` (int64: O, I), or `<module>.bitmask` (uint8
`[O, I/8]`), and string metadata: which of the two, the pattern, and the digests of the masks (a changed digit would be
another legal mask), of the dense model they were made for (they are valid for no other weights) and of the recipe.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskgen.core.config import check_module_name
from maskgen.core.digest import check_digest, digest_tensors
from maskgen.core.digits import digits_per_byte, pack_digits, unpack_digits
from maskgen.core.errors import FormatError, PatternError, clip
from maskgen.core.files import check_tensor_names, open_tensors, save_tensors, temporary_sibling
from maskgen.core.pattern import NMPattern

MASK_FORMAT = "sparse_nm.masks"
FORMAT_VERSION = 2
BITMASK_SUFFIX = ".bitmask"
DIGITS_SUFFIX = ".digits"
SHAPE_SUFFIX = ".shape"

BITS, DIGITS = "bits", "pattern-digits"
"""Encodings of a mask file. The pattern decides which one is used; a file that uses the other one is an error."""

_METADATA_KEYS = ("format", "format_version", "encoding", "pattern", "mask_digest", "base_digest", "recipe_digest")


def pack_bits(mask_OI: Tensor) -> Tensor:
    """Bool `[O, I]` (I a multiple of 8) to uint8 `[O, I/8]`, bit j of byte k = column 8k + j."""
    if mask_OI.dtype != torch.bool or mask_OI.ndim != 2 or mask_OI.shape[1] % 8:
        raise PatternError(f"mask {mask_OI.dtype} {tuple(mask_OI.shape)}: expected bool [O, I] with I a multiple of 8")
    packed = np.packbits(mask_OI.cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed).to(mask_OI.device)


def unpack_bits(bitmask: Tensor) -> Tensor:
    """Uint8 `[O, I/8]` to bool `[O, I]`; the inverse of `pack_bits`."""
    if bitmask.dtype != torch.uint8 or bitmask.ndim != 2:
        raise FormatError(f"bitmask {bitmask.dtype} {tuple(bitmask.shape)}: expected uint8 [O, I/8]")
    if bitmask.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bitmask.numpy(), axis=1, bitorder="little").view(np.bool_))
    weights = torch.tensor([1 << position for position in range(8)], dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(-1) & weights).ne(0).flatten(1)


@dataclass(frozen=True)
class MaskSet:
    """The masks of one model and where they came from.

    `bitmasks` maps a module name to uint8 `[O, I/8]`. `base_digest` and `recipe_digest` are `sha256:<hex>` digests of
    the dense model and of the recipe that made the masks.
    """

    pattern: NMPattern
    bitmasks: Mapping[str, Tensor]
    base_digest: str
    recipe_digest: str

    @classmethod
    def from_masks(
        cls, pattern: NMPattern, masks: Mapping[str, Tensor], base_digest: str, recipe_digest: str
    ) -> MaskSet:
        """Pack bool masks `[O, I]`; raises `PatternError` if one does not follow the pattern."""
        for name, mask_OI in masks.items():
            pattern.check_mask(mask_OI, name)
        return cls(pattern, {name: pack_bits(mask) for name, mask in masks.items()}, base_digest, recipe_digest)

    @property
    def names(self) -> tuple[str, ...]:
        """Module names, sorted."""
        return tuple(sorted(self.bitmasks))

    def mask(self, name: str) -> Tensor:
        """The bool mask `[O, I]` of one module; `KeyError` when there is none."""
        return unpack_bits(self.bitmasks[name])

    def digest(self) -> str:
        """`sha256:<hex>` over pattern, names, shapes and bits; independent of order and of where it is stored."""
        return digest_bitmasks(self.pattern, ((name, self.bitmasks[name]) for name in self.names))

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, atomically."""
        encoding = DIGITS if digits_per_byte(self.pattern) else BITS
        digests = (self.digest(), self.base_digest, self.recipe_digest)
        values = (MASK_FORMAT, str(FORMAT_VERSION), encoding, str(self.pattern), *digests)
        tensors = {}
        for name in self.names:
            if encoding == BITS:
                tensors[name + BITMASK_SUFFIX] = self.bitmasks[name].contiguous()
            else:
                mask_OI = self.mask(name)
                tensors[name + DIGITS_SUFFIX] = pack_digits(mask_OI, self.pattern)
                tensors[name + SHAPE_SUFFIX] = torch.tensor(mask_OI.shape, device="cpu")
        with temporary_sibling(Path(path)) as temporary:
            save_tensors(tensors, temporary, dict(zip(_METADATA_KEYS, values, strict=True)))

    @classmethod
    def load(cls, path: Path | str) -> MaskSet:
        """Read and verify a mask file; `FormatError` names the first thing that is wrong."""
        path = Path(path)
        with open_tensors(path) as file:
            check_tensor_names(path)
            metadata = file.metadata() or {}
            pattern = _read_metadata(metadata, path)
            keys = sorted(file.keys())
            if metadata["encoding"] == BITS:
                bitmasks = dict(_read_bits(file, key, pattern, path) for key in keys)
            else:
                bitmasks = dict(_read_digits(file, name, pattern, path) for name in _digit_names(keys, path))
        if not bitmasks:
            raise FormatError(f"{path}: holds no masks")
        masks = cls(pattern, bitmasks, metadata["base_digest"], metadata["recipe_digest"])
        if masks.digest() != metadata["mask_digest"]:
            raise FormatError(
                f"{path}: the masks have digest {masks.digest()}, the file says {metadata['mask_digest']}; it is "
                "damaged or was changed"
            )
        return masks


def _read_metadata(metadata: Mapping[str, str], path: Path) -> NMPattern:
    """Check the metadata of a mask file and return its pattern."""
    is_ours, version = metadata.get("format") == MASK_FORMAT, metadata.get("format_version")
    if is_ours and version is not None and version != str(FORMAT_VERSION):
        raise FormatError(f"{path}: format_version {clip(version)}, this release reads {FORMAT_VERSION}")
    if not is_ours or sorted(metadata) != sorted(_METADATA_KEYS):
        raise FormatError(
            f"{path}: not a mask file: metadata keys {clip(sorted(metadata))}, expected {sorted(_METADATA_KEYS)} with "
            f"format {MASK_FORMAT!r}; masks are written by `maskgen run --masks-out`"
        )
    for key in ("mask_digest", "base_digest", "recipe_digest"):
        check_digest(metadata[key], f"{path}: {key}")
    try:
        pattern = NMPattern.parse(metadata["pattern"])
    except PatternError as error:
        raise FormatError(f"{path}: {error}") from None
    encoding = DIGITS if digits_per_byte(pattern) else BITS
    if metadata["encoding"] != encoding:
        raise FormatError(f"{path}: encoding {clip(metadata['encoding'])}, expected {encoding!r} for pattern {pattern}")
    return pattern


def _read_bits(file: Any, key: str, pattern: NMPattern, path: Path) -> tuple[str, Tensor]:
    """One mask stored as bits: (module name, bitmask). The header is checked before any bytes are read."""
    dtype, shape = _header(file, key)
    if not key.endswith(BITMASK_SUFFIX) or dtype != "U8" or len(shape) != 2 or min(shape, default=0) < 1:
        raise FormatError(
            f"{path}: tensor {clip(key)}: {dtype} {shape}; expected '<module>{BITMASK_SUFFIX}', U8 [out, in/8] with no "
            "empty side"
        )
    name = key.removesuffix(BITMASK_SUFFIX)
    check_module_name(name, f"{path}: tensor {clip(key)}")
    if shape[1] * 8 % pattern.m:
        raise FormatError(f"{path}: {key}: {shape[1] * 8} columns are no multiple of {pattern.m}, pattern {pattern}")
    bitmask = file.get_tensor(key)
    check_bits(bitmask, pattern, f"{path}: {name}")
    return name, bitmask


def _digit_names(keys: list[str], path: Path) -> list[str]:
    """The modules of a file of digits: every one has both of its tensors, and nothing else is there."""
    names = [key.removesuffix(DIGITS_SUFFIX) for key in keys if key.endswith(DIGITS_SUFFIX)]
    expected_keys = {name + suffix for name in names for suffix in (DIGITS_SUFFIX, SHAPE_SUFFIX)}
    for key in sorted(expected_keys.symmetric_difference(keys)):
        raise FormatError(
            f"{path}: tensor {clip(key)} is {'missing' if key in expected_keys else 'unexpected'}; every mask is "
            f"'<module>{DIGITS_SUFFIX}' and '<module>{SHAPE_SUFFIX}'"
        )
    return names


def _read_digits(file: Any, name: str, pattern: NMPattern, path: Path) -> tuple[str, Tensor]:
    """One mask stored as digits: (module name, bitmask). Headers are checked before any bytes are read."""
    check_module_name(name, f"{path}: tensor {clip(name + DIGITS_SUFFIX)}")
    (digits_dtype, digits_shape), (shape_dtype, shape_shape) = (
        _header(file, name + suffix) for suffix in (DIGITS_SUFFIX, SHAPE_SUFFIX)
    )
    if (digits_dtype, len(digits_shape), shape_dtype, shape_shape) != ("U8", 1, "I64", [2]):
        raise FormatError(
            f"{path}: {name}: digits {digits_dtype} {digits_shape}, shape {shape_dtype} {shape_shape}; expected U8 "
            "[bytes] and I64 [2]"
        )
    rows, columns = file.get_tensor(name + SHAPE_SUFFIX).tolist()
    if min(rows, columns) < 1 or columns % pattern.column_multiple:
        raise FormatError(
            f"{path}: {name}: a mask [{rows}, {columns}]; expected positive numbers, the second a multiple of "
            f"{pattern.column_multiple} for pattern {pattern}"
        )
    digits = file.get_tensor(name + DIGITS_SUFFIX)
    return name, pack_bits(unpack_digits(digits, (rows, columns), pattern, f"{path}: {name}"))


def _header(file: Any, key: str) -> tuple[str, list[int]]:
    tensor_slice = file.get_slice(key)
    return str(tensor_slice.get_dtype()), tensor_slice.get_shape()


def digest_bitmasks(pattern: NMPattern, bitmasks: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of masks given as (module name, bitmask) in the order of their names; see `MaskSet.digest`."""
    return digest_tensors(f"{MASK_FORMAT} {pattern}", bitmasks)


def check_bits(bitmask: Tensor, pattern: NMPattern, name: str) -> None:
    """Raise `FormatError` unless every group of `pattern` has exactly `n` bits set.

    Workspace: a byte per 8 weights where groups do not cross bytes and the bitmask is on the CPU, else 2 per weight.
    """
    is_matrix_on_cpu = bitmask.device.type == "cpu" and bitmask.dtype == torch.uint8 and bitmask.ndim == 2
    if is_matrix_on_cpu and 8 % pattern.m == 0 and np.take(_legal_bytes(pattern), bitmask.numpy()).all():
        return
    try:
        pattern.check_mask(unpack_bits(bitmask), name)
    except PatternError as error:
        raise FormatError(f"{error}; the file is damaged or was not written by maskgen") from None


@cache
def _legal_bytes(pattern: NMPattern) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Bool `[256]`: which bytes of a bitmask consist of groups with `n` bits set, for an `m` that divides 8."""
    group = (1 << pattern.m) - 1
    starts = range(0, 8, pattern.m)
    return np.array([all((byte >> at & group).bit_count() == pattern.n for at in starts) for byte in range(256)])
