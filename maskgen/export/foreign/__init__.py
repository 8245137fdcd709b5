"""Checkpoints of other tools that hold 2:4 weights: one file = one way to store a layer. Their layouts are facts from
the tools' public sources; every file here names them.

`ForeignLayer` is what they have in common: the tensors a layer consists of, its shape, and its weight, packed or dense.
Everything in such a directory is hostile input: shapes are checked from headers, before a tensor is read.

Legend: O = out features, I = in features, V = kept values per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from maskgen.core.errors import FormatError
from maskgen.core.files import open_tensors
from maskgen.core.layout import TensorHeader
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT_DTYPES

TWO_FOUR = NMPattern(2, 4)

FLOATS = ("BF16", "F16", "F32")
SCALE, ZERO_POINT = ".weight_scale", ".weight_zero_point"
QUANTISED = (SCALE, ZERO_POINT, ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point")
"""Suffixes of tensors that belong to a quantised weight, or say how activations would be quantised."""


@dataclass(frozen=True)
class Source:
    """A directory that is to be converted: `config.json`, and the headers of all tensors by name."""

    path: Path
    hf_config: Mapping[str, Any]
    headers: Mapping[str, TensorHeader]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights that have to become floats: what `config.json` names, or else bfloat16."""
        claimed = self.hf_config.get("dtype", self.hf_config.get("torch_dtype"))
        return next((dtype for dtype in FLOAT_DTYPES if claimed == str(dtype).removeprefix("torch.")), torch.bfloat16)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor (CPU)."""
        with open_tensors(self.headers[name].path) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def header(self, name: str) -> TensorHeader:
        """The header of a tensor that has to be there; `FormatError` if it is not."""
        if name not in self.headers:
            raise FormatError(f"{self.path}: no tensor {name}, which a layer stored like this one has")
        return self.headers[name]


@dataclass(frozen=True)
class ForeignLayer(ABC):
    """One weight `[O, I]` of the module `name`. `shape` is (O, I)."""

    FOUND: ClassVar[str]
    """What such a checkpoint is called."""

    BECOMES_FLOATS: ClassVar[bool] = False
    """Whether what is packed as floats may have been stored as codes."""

    source: Source
    name: str
    shape: tuple[int, int]

    @property
    @abstractmethod
    def tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors that stand for the weight; those that are there."""

    @abstractmethod
    def packed(self) -> PackedTensor | None:
        """The weight as kept values and bitmask; None where it does not follow the pattern. Raises `FormatError`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight `[O, I]` as floats, for a layer that is not packed after all."""

    def stored(self, *suffixes: str) -> tuple[str, ...]:
        """Those of the module's tensors that are there."""
        return tuple(self.name + suffix for suffix in suffixes if self.name + suffix in self.source.headers)

    def refuse(self, problem: str) -> FormatError:
        """An error about this layer."""
        return FormatError(f"{self.source.path}: {self.name}: {problem}")

    def floats(self, packed: PackedTensor) -> Tensor:
        """The dense weight of a packed one, as floats of the source's dtype or of its own."""
        weight_OI = packed.unpack()
        return weight_OI if packed.values.dtype in FLOAT_DTYPES else weight_OI.to(self.source.dtype)

    def check_pattern(self, pattern: NMPattern = TWO_FOUR) -> None:
        """`FormatError` unless rows consist of whole groups and bytes."""
        if self.shape[1] % pattern.column_multiple:
            raise self.refuse(f"{self.shape[1]} inputs, expected a multiple of {pattern.column_multiple}")

    def row_scale(self) -> Tensor:
        """The scale of 8-bit codes as float32 `[O]`; stored for each row, or one for all. Raises `FormatError`."""
        self._check_symmetric()
        header, rows = self.source.header(self.name + SCALE), self.shape[0]
        if header.dtype not in FLOATS or list(header.shape) not in ([], [1], [1, 1], [rows], [rows, 1]):
            raise self.refuse(
                f"{SCALE[1:]} {header.dtype} {list(header.shape)}, expected floats, one for each of {rows} rows or one "
                "for all"
            )
        return self.source.tensor(self.name + SCALE).float().reshape(-1).expand(rows).contiguous()

    def _check_symmetric(self) -> None:
        for name in self.stored(ZERO_POINT):
            if self.source.tensor(name).float().ne(0).any():
                raise self.refuse("zero points other than 0: asymmetric codes are not supported")
