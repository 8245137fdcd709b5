"""Reading files that may be hostile, and writing files that are whole or absent.

Reading: `read_json` bounds size, depth and number of values, and refuses duplicates and non-finite numbers;
`open_tensors` wraps safetensors so that truncation, absurd headers and overlapping offsets end in one `FormatError`.
Two parsers may disagree about a key that is given twice, so what was verified could differ from what is used:
duplicates are refused, in safetensors headers too (the safetensors library takes the last one). Nothing here executes
or imports what a file says.

Writing: everything is written under a temporary name in the same directory, flushed to disk, then renamed. A killed
writer leaves a temporary name behind, never a half file under the real one. What fails is a `StorageError` with the
path (`failures`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskgen.core.errors import FormatError, StorageError, clip
from maskgen.core.failures import TEMPORARY_SUFFIX, explained

MAX_JSON_BYTES = 64 << 20
MAX_JSON_VALUES = 1 << 22
"""Parsed values take up to twenty times the bytes of their text; the index of a 1T model holds a tenth of these."""

_LFS_POINTER = b"version https://git-lfs"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{clip(text)} does not fit a float")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"duplicate key {clip(name)}")
            seen.add(name)
    return result


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    if sum(data.count(separator) for separator in b",[{") > MAX_JSON_VALUES:
        raise FormatError(f"{path}: more than {MAX_JSON_VALUES} JSON values")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_duplicates
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: not valid JSON: {error or 'nested too deeply'}; download or write it again"
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def _read_bounded(file: BinaryIO, size_bytes: int, path: Path) -> bytes:
    if size_bytes > MAX_JSON_BYTES:
        raise FormatError(f"{path}: {size_bytes} bytes of JSON, at most {MAX_JSON_BYTES} are read")
    return file.read(size_bytes)


def _check_regular(path: Path) -> None:
    if not path.is_file():
        raise FormatError(f"{path}: {'not a regular file' if path.exists() else 'no such file; check the path'}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `FormatError` on anything that is not one strict, unambiguous object of bounded size."""
    _check_regular(path)
    with path.open("rb") as file:
        return _parse_json(_read_bounded(file, path.stat().st_size, path), path)


def check_keys(value: Mapping[str, Any], expected: tuple[str, ...], where: str) -> None:
    """`FormatError` unless a JSON object has exactly the `expected` keys."""
    unknown, missing = sorted(set(value) - set(expected)), sorted(set(expected) - set(value))
    if unknown or missing:
        raise FormatError(
            f"{where}: unknown keys {clip(unknown)}, missing keys {missing}; expected exactly {list(expected)}"
        )


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for lazy reading; every failure to parse it is a `FormatError` with the path."""
    _check_regular(path)
    check_no_pointer(path)
    with explained(path), safe_open(path, framework="pt") as file:
        yield file


def check_no_pointer(path: Path) -> None:
    """`FormatError` for the text that Git LFS leaves in place of a file which was not downloaded."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise FormatError(f"{path}: a pointer of Git LFS, not the file itself; get it with git lfs pull")


def check_tensor_names(path: Path) -> None:
    """Raise `FormatError` if the header of a safetensors file (one that opens) names a tensor twice."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        _parse_json(_read_bounded(file, header_bytes, path), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file and flush it to disk; `StorageError` when that fails (disk full, file too large).

    Its permissions are those of any new file; safetensors alone would let nobody else read it.
    """
    with explained(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(tensors), path, metadata=dict(metadata))
        path.chmod(mode)
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(path: Path) -> None:
    """`StorageError` unless `path`, or the first directory to be made on the way to it, can be made. Nothing is
    written: what cannot be known in this way, a full disk say, is not found."""
    folder = path.absolute().parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise StorageError(f"{path}: {folder} is not a directory; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: {folder} cannot be written; change its permissions, or choose another place")


def check_writable(*paths: Path | None) -> None:
    """`check_folder` of files to write, or to replace: to be called before minutes are spent on what they will hold."""
    for path in paths:
        if path is not None:
            if path.exists() and not path.is_file():
                raise StorageError(f"{path}: not a regular file; choose another name")
            check_folder(path)


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (its directory is made); on success rename it to `path`, else remove it.

    `StorageError` when something cannot be written, or `path` is there and no regular file: a device would be replaced.
    """
    with explained(path):
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")  # hosts may share a folder
        try:
            yield temporary
            temporary.replace(path)
            fsync_path(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def is_temporary(path: Path) -> bool:
    """Whether a killed `temporary_sibling` may have left this name behind."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, whole or not at all."""
    with temporary_sibling(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        fsync_path(temporary)
