"""What the header of a NumPy array (`.npy`) says, read before anything is made of its numbers.

NumPy reads a header as a Python literal, which runs nothing, but the literal may be damaged or hostile: for those it
raises errors of many types, and it allocates whatever shape they claim. Format:
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

HEADER_BYTES = 1 << 10
"""More than the header of an array of numbers takes."""

_READERS = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
    (3, 0): npy_format.read_array_header_2_0,  # differs in how field names are encoded, and numbers have none
}
_DAMAGED = (ValueError, TypeError, LookupError, SyntaxError, RecursionError, MemoryError, TokenError)


@dataclass(frozen=True)
class NpyHeader:
    """Type and shape of an array, and the byte at which its numbers start."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


def read_header(content: bytes) -> NpyHeader | None:
    """The header with which `content`, at least the first `HEADER_BYTES` of a file, begins; None if that is none."""
    file = io.BytesIO(content)
    try:
        shape, _, dtype = _READERS[npy_format.read_magic(file)](file)
    except _DAMAGED:
        return None
    return NpyHeader(dtype, shape, file.tell())
