"""Masks as values: bool tensors in memory, bitmasks on disk, and `MaskSet` for a whole model.

A mask is never recovered from `weight == 0`: a kept weight may be zero. On disk it is one bit per weight, row-major,
little-endian (bit j of byte k is column 8k + j), the layout of `numpy.packbits(bitorder="little")`. For 2:4 that costs
exactly what 2-bit indices cost, it needs no per-pattern code, and it is checked with a population count.

A `MaskSet` file is a safetensors file with one `<module>.bitmask` per layer and string metadata: pattern, the digest of
the dense model the mask was made for (a mask is only valid for those weights) and the digest of the recipe.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskgen.core.config import check_module_name
from maskgen.core.digest import check_digest, digest_tensors
from maskgen.core.errors import FormatError, PatternError, clip
from maskgen.core.files import check_tensor_names, open_tensors, save_tensors, temporary_sibling
from maskgen.core.pattern import NMPattern

MASK_FORMAT = "sparse_nm.masks"
FORMAT_VERSION = 1
BITMASK_SUFFIX = ".bitmask"

_METADATA_KEYS = ("format", "format_version", "pattern", "base_digest", "recipe_digest")


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
        metadata = dict(
            zip(
                _METADATA_KEYS,
                (MASK_FORMAT, str(FORMAT_VERSION), str(self.pattern), self.base_digest, self.recipe_digest),
                strict=True,
            )
        )
        tensors = {name + BITMASK_SUFFIX: self.bitmasks[name].contiguous() for name in self.names}
        with temporary_sibling(Path(path)) as temporary:
            save_tensors(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path | str) -> MaskSet:
        """Read and verify a mask file; `FormatError` names the first thing that is wrong."""
        path = Path(path)
        with open_tensors(path) as file:
            check_tensor_names(path)
            metadata = file.metadata() or {}
            if sorted(metadata) != sorted(_METADATA_KEYS) or metadata["format"] != MASK_FORMAT:
                raise FormatError(
                    f"{path}: not a mask file: metadata keys {clip(sorted(metadata))}, expected "
                    f"{sorted(_METADATA_KEYS)} with format {MASK_FORMAT!r}; masks are written by "
                    "`maskgen run --masks-out`"
                )
            if metadata["format_version"] != str(FORMAT_VERSION):
                raise FormatError(
                    f"{path}: format_version {clip(metadata['format_version'])}, this release reads {FORMAT_VERSION}"
                )
            check_digest(metadata["base_digest"], f"{path}: base_digest")
            check_digest(metadata["recipe_digest"], f"{path}: recipe_digest")
            try:
                pattern = NMPattern.parse(metadata["pattern"])
            except PatternError as error:
                raise FormatError(f"{path}: {error}") from None
            bitmasks = {}
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                tensor_slice = file.get_slice(key)
                check_bitmask_header(key, str(tensor_slice.get_dtype()), tensor_slice.get_shape(), pattern, path)
                name = key.removesuffix(BITMASK_SUFFIX)
                bitmasks[name] = file.get_tensor(key)
                check_bits(bitmasks[name], pattern, f"{path}: {name}")
        if not bitmasks:
            raise FormatError(f"{path}: holds no masks")
        return cls(pattern, bitmasks, metadata["base_digest"], metadata["recipe_digest"])


def check_bitmask_header(key: str, dtype: str, shape: list[int], pattern: NMPattern, path: Path) -> None:
    """Check name, dtype and shape of a stored bitmask before its bytes are read."""
    if not key.endswith(BITMASK_SUFFIX) or dtype != "U8" or len(shape) != 2 or min(shape, default=0) < 1:
        raise FormatError(
            f"{path}: tensor {clip(key)}: {dtype} {shape}; expected '<module>{BITMASK_SUFFIX}', U8 [out, in/8] with no "
            "empty side"
        )
    check_module_name(key.removesuffix(BITMASK_SUFFIX), f"{path}: tensor {clip(key)}")
    if shape[1] * 8 % pattern.m:
        raise FormatError(f"{path}: {key}: {shape[1] * 8} columns are no multiple of {pattern.m}, pattern {pattern}")


def digest_bitmasks(pattern: NMPattern, bitmasks: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of masks given as (module name, bitmask) in the order of their names; see `MaskSet.digest`."""
    return digest_tensors(f"{MASK_FORMAT} {pattern}", bitmasks)


def check_bits(bitmask: Tensor, pattern: NMPattern, name: str) -> None:
    """Raise `FormatError` unless every group of `pattern` has exactly `n` bits set. Workspace: 2 bytes a weight."""
    try:
        pattern.check_mask(unpack_bits(bitmask), name)
    except PatternError as error:
        raise FormatError(f"{error}; the file is damaged or was not written by maskgen") from None
