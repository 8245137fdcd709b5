"""What a file of text or token ids is, by the end of its name, and how it is opened. The case of letters is no matter.

    .jsonl  .ndjson                  JSON lines: one object per line
    .json                            one array of objects; or objects one after the other, which JSON lines are; or one
                                     object with one list of objects
    .csv  .tsv                       rows under a line of column names
    .parquet                         rows of columns
    .npy  .safetensors               token ids
    .txt  .text  .md                 plain text: one document
    .arrow  .bin  .pdf  .zip ...     what is known to be no text: refused by name
    .html  .xml  .yaml  .srt ...     text between tags, keys or times, which would be taken for text: refused by name
    anything else, or nothing        plain text (.log, .rst, .py ...), unless it begins with a JSON object or markup:
                                     refused, so that rows or tags under an unusual name are not taken for one document
    .gz  .zst  .bz2  .xz             behind any of these but token ids: the same, compressed

Text is UTF-8; a byte-order mark at its beginning is passed over. Compressed files are unpacked as they are read, and
refused when they unpack to more than text does (`MAX_RATIO`), as damaged or hostile ones may.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import stat
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, TextIO

from maskgen.core.errors import DataError

MAX_RATIO = 200
"""Most bytes that a byte of a compressed file may unpack to. Text has 2 to 10, very repetitive text 100."""

FREE_BYTES = 64 << 20
"""So much may be unpacked at any ratio."""


class Kind(Enum):
    """What a file holds."""

    LINES = "JSON lines"
    JSON = "JSON"
    CSV = "comma-separated values"
    TSV = "tab-separated values"
    PARQUET = "parquet"
    NUMPY = "token ids of numpy"
    SAFETENSORS = "token ids of safetensors"
    TEXT = "plain text"


_SUFFIXES = {
    ".jsonl": Kind.LINES, ".ndjson": Kind.LINES, ".jsonlines": Kind.LINES, ".json": Kind.JSON, ".csv": Kind.CSV,
    ".tsv": Kind.TSV, ".parquet": Kind.PARQUET, ".npy": Kind.NUMPY, ".safetensors": Kind.SAFETENSORS,
}  # fmt: skip
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_PLAIN = (".txt", ".text", ".md")
_NO_TEXT = {
    ".arrow", ".feather", ".orc", ".avro", ".npz", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib",
    ".h5", ".hdf5", ".onnx", ".gguf", ".msgpack", ".tfrecord", ".db", ".sqlite", ".sqlite3", ".duckdb", ".pdf",
    ".doc", ".docx", ".odt", ".rtf", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".epub", ".zip", ".tar", ".tgz",
    ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".lzma", ".br", ".jar", ".whl", ".so", ".dll", ".exe", ".o", ".pyc",
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".tiff", ".mp3", ".mp4", ".wav", ".flac",
}  # fmt: skip
_WRAPPED = {
    ".html", ".htm", ".xhtml", ".mhtml", ".xml", ".rss", ".atom", ".svg", ".tei", ".yaml", ".yml", ".toml", ".ini",
    ".plist", ".warc", ".wet", ".eml", ".mbox", ".ipynb", ".srt", ".vtt",
}  # fmt: skip
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"PAR1": ".parquet",
    b"\x93NUMPY": ".npy",
}
_KNOWN = (
    "give plain text, .json, .jsonl, .ndjson, .csv, .tsv or .parquet (each also as .gz, .zst, .bz2 or .xz), token ids "
    "as .npy or .safetensors, or hf:org/name"
)


@dataclass(frozen=True)
class Format:
    """What a file is: its kind, how it is compressed ("" or a suffix), and whether its name says that it is `plain`."""

    kind: Kind
    packed: str = ""
    plain: bool = False


def format_of(path: Path) -> Format:
    """The format of a file, from its name alone. `DataError` for one that is not read."""
    suffix = path.suffix.lower()
    packed = suffix if suffix in _PACKED else ""
    inner = Path(path.stem).suffix.lower() if packed else suffix
    kind = _SUFFIXES.get(inner, Kind.TEXT)
    if inner in _NO_TEXT:
        raise DataError(f"{path}: {inner} files are not read; {_KNOWN}")
    if inner in _WRAPPED:
        raise DataError(
            f"{path}: the text in {inner} files is not told from what is around it; write the text alone to a .txt or "
            ".jsonl file, or name this one .txt to have all of it read as plain text"
        )
    if packed and (kind in (Kind.NUMPY, Kind.SAFETENSORS) or inner in _PACKED):
        raise DataError(f"{path}: {inner} inside of {packed} is not read; unpack it first")
    return Format(kind, packed, inner in _PLAIN)


def needs(package: str) -> str:
    """What to do about a package of the extra `data` that is not installed."""
    return f"reading it needs {package}; install it with: pip install 'sparse-serve[data]'"


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a file may raise into `DataError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file; give a file of text or token ids, or hf:org/name")
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); {instead(path)}") from None
    except OSError as error:
        advice = "; check the path" if isinstance(error, FileNotFoundError) else ""
        raise DataError(f"{path}: cannot be read: {error.strerror or error}{advice}") from None


@contextlib.contextmanager
def open_text(path: Path, packed: str, newline: str | None = None) -> Iterator[TextIO]:
    """The text of a file, unpacked; `newline` as in `open`. Reading it raises `DataError`."""
    with (
        readable(path),
        _open_bytes(path, packed) as stream,
        io.TextIOWrapper(stream, "utf-8-sig", newline=newline) as text,
    ):
        yield text


@contextlib.contextmanager
def open_seekable(path: Path, packed: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, for readers that jump about in it: a compressed one is unpacked into a temporary file."""
    with readable(path), _open_bytes(path, packed) as stream:
        if not packed:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            while block := stream.read(1 << 20):
                unpacked.write(block)
            unpacked.seek(0)
            yield unpacked


@contextlib.contextmanager
def _open_bytes(path: Path, packed: str) -> Iterator[io.BufferedReader]:
    with path.open("rb") as stored:
        if not packed:
            yield stored
            return
        with _unpacker(path, stored, packed) as stream:
            limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
            yield io.BufferedReader(_Unpacked(stream, path, packed, limit), 1 << 20)


def _unpacker(path: Path, stored: IO[bytes], packed: str) -> Any:
    if packed == ".gz":
        return gzip.GzipFile(fileobj=stored)
    if packed == ".bz2":
        return bz2.BZ2File(stored)
    if packed == ".xz":
        return lzma.LZMAFile(stored)
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: {needs('pyarrow')}") from None
    return pyarrow.CompressedInputStream(stored, "zstd")


class _Unpacked(io.RawIOBase):
    """What is unpacked so far, counted; damage and an absurd size are `DataError`s."""

    def __init__(self, stream: Any, path: Path, packed: str, limit: int) -> None:
        self.stream, self.path, self.packed, self.left = stream, path, packed, limit

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        try:
            block: bytes = self.stream.read(len(target))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{self.path}: not a sound {self.packed} file: {error}; write it again") from None
        self.left -= len(block)
        if self.left < 0:
            raise DataError(
                f"{self.path}: unpacks to more than {MAX_RATIO} times its size, as text does not; unpack it yourself "
                "if that is meant"
            )
        target[: len(block)] = block
        return len(block)


def instead(path: Path) -> str:
    """What to do with a file that is no UTF-8 text."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, suffix in _MAGIC.items():
        if start.startswith(magic) and path.suffix.lower() != suffix:
            return f"it begins like a {suffix} file: name it so"
    return "convert it to UTF-8"
