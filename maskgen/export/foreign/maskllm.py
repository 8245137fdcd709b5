"""Masks of MaskLLM, for the dense model they were learned on: a NumPy archive (`.npz`) with, for the parameter P of the
model, the array `P.mask`: uint8, the bits of the mask `[O, I]` row by row, the first in the highest bit of its byte.

A mask keeps at most two of each group of four: its writer takes them from where a pruned weight is not zero. Source:
`tool_compress_mask.py` and `eval_llama_ppl.py` of https://github.com/NVlabs/MaskLLM.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maskgen.core import npy
from maskgen.core.errors import FormatError, clip
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.export.foreign import TWO_FOUR, ForeignLayer
from maskgen.export.foreign.masked import mask_of

_SUFFIX = ".weight.mask"
_MAX_NAME = 256
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError, LookupError,
    RuntimeError, OverflowError,
)  # fmt: skip
"""What zipfile raises for archives that are damaged, encrypted or compressed in a way that it does not know."""


class MaskArchive:
    """The masks of an archive, by module. Nothing is read of it but a mask of the size that the model implies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened(f"{path}: not a .npz archive of masks") as archive:
            entries = archive.infolist()
        self.sizes: Mapping[str, int] = {entry.filename: entry.file_size for entry in entries}
        if len(self.sizes) != len(entries):
            raise FormatError(f"{path}: holds two masks of one name; download it again")
        wrong = [name for name in self.sizes if not _is_plain(name)]
        if wrong or not entries:
            raise FormatError(
                f"{path}: {'holds ' + clip(wrong[0]) if wrong else 'is empty'}; expected names such as "
                f"model.layers.0.mlp.up_proj{_SUFFIX}, as MaskLLM's tool_compress_mask.py writes them"
            )

    @property
    def modules(self) -> list[str]:
        """Names of the modules that have a mask."""
        return [name.removesuffix(_SUFFIX + ".npy") for name in self.sizes]

    @contextmanager
    def _opened(self, where: str) -> Iterator[zipfile.ZipFile]:
        """The archive; what cannot be read of it inside is a `FormatError` that begins with `where`."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except _UNREADABLE as error:
            raise FormatError(f"{where}: {clip(str(error))}; download the masks again") from None

    def mask(self, module: str, shape: tuple[int, int]) -> Tensor:
        """The mask `[O, I]` of a module, True = kept."""
        where, bits = f"{self.path}: {module}", shape[0] * shape[1]
        if self.sizes[module + _SUFFIX + ".npy"] > bits // 8 + npy.HEADER_BYTES:
            raise FormatError(f"{where}: {self.sizes[module + _SUFFIX + '.npy']} bytes for a mask {list(shape)}")
        with self._opened(where) as archive, archive.open(module + _SUFFIX + ".npy") as file:
            content = file.read(self.sizes[module + _SUFFIX + ".npy"])
        header = npy.read_header(content)
        if header is None:
            raise FormatError(f"{where}: not a NumPy array; download the masks again")
        expected = (bits + 7) // 8
        if header.dtype != np.uint8 or header.shape != (expected,) or len(content) != header.start + expected:
            raise FormatError(
                f"{where}: {header.dtype} {clip(list(header.shape))} in {len(content)} bytes, expected uint8 "
                f"[{expected}]: the bits of a mask {list(shape)}; are these the masks of this model?"
            )
        packed = np.frombuffer(content, np.uint8, offset=header.start)
        return torch.from_numpy(np.unpackbits(packed)[:bits].reshape(shape).astype(np.bool_))


def _is_plain(name: str) -> bool:
    """Whether a member's name may be one of a mask, and may stand in an error as it is."""
    return name.endswith(_SUFFIX + ".npy") and name.isprintable() and len(name) <= _MAX_NAME


@dataclass(frozen=True)
class LearnedMask(ForeignLayer):
    """A dense weight that is to be multiplied by its mask in `archive`."""

    FOUND: ClassVar[str] = "MaskLLM masks"

    archive: MaskArchive
    pattern: NMPattern = TWO_FOUR

    @property
    def tensors(self) -> tuple[str, ...]:
        """See `ForeignLayer.tensors`."""
        return self.stored(".weight")

    def packed(self) -> PackedTensor:
        """See `ForeignLayer.packed`. Groups of which the mask keeps fewer get zeros."""
        kept_OI = self.archive.mask(self.name, self.shape)
        mask_OI = mask_of(kept_OI, self.pattern)
        if mask_OI is None:
            raise FormatError(f"{self.archive.path}: {self.name}: the mask keeps more than {self.pattern} of a group")
        weight_OI = self.source.tensor(self.name + ".weight").masked_fill(~kept_OI, 0)
        return PackedTensor.pack(weight_OI, mask_OI, self.pattern, self.name)

    def dense(self) -> Tensor:
        """See `ForeignLayer.dense`: with the mask applied."""
        return self.packed().unpack()
