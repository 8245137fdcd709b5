"""Where text comes from: files and hub datasets, read as a stream of documents, never whole.

    *.jsonl                          one document per line, in the field "text"
    *.parquet                        one document per row, in the column "text", read row group by row group
    hf:ORG/NAME[:CONFIG][:SPLIT]     a dataset of the Hugging Face hub, column "text"; split "train" if none is given,
                                     and an empty CONFIG for the only one (`hf:org/name::validation`)
    anything else                    plain text, one document

A dataset that brings its own loading script is refused by the `datasets` library: only data is fetched, never code.
Every damaged or hostile file ends in one `DataError` that says where. A document is an iterator of stretches of text,
so that a file of one huge document costs no more memory than any other.
"""

from __future__ import annotations

import contextlib
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskgen.core.errors import DataError, clip

READ_CHARS = 1 << 19
"""Characters of plain text read at a time."""

MAX_DOCUMENT_CHARS = 1 << 28
"""Longest line of a `.jsonl` file. A line has to be parsed whole; nobody's document is this long."""

HUB_PREFIX = "hf:"
_ROWS = 1024
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_HUB = re.compile(rf"hf:(?P<name>{_PART}/{_PART})(?::(?!$)(?P<config>{_PART})?(?::(?P<split>{_PART}))?)?")


def is_hub(source: Path | str) -> bool:
    """Whether `source` is meant as a hub dataset."""
    return str(source).startswith(HUB_PREFIX)


def documents(source: Path | str) -> Iterator[Iterator[str]]:
    """The documents of a source, each to be used up before the next one is asked for. Raises `DataError`."""
    if is_hub(source):
        return _whole(_hub_texts(str(source)), str(source))
    path = Path(source)
    if path.suffix == ".jsonl":
        return _whole(_lines(path), str(path))
    if path.suffix == ".parquet":
        return _whole(_rows(path), str(path))
    return iter([_chunks(path)])


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a file may raise into `DataError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file; give a file of text or token ids, or hf:org/name")
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _whole(texts: Iterator[tuple[str, Any]], source: str) -> Iterator[Iterator[str]]:
    """Documents that come in one stretch each, checked; `texts` gives (where, text)."""
    for where, text in texts:
        if not isinstance(text, str):
            raise DataError(f'{source}{where}: "text" is {clip(text)}, expected a string')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{source}{where}: half of a surrogate pair at character {error.start}") from None
        yield iter([text])


def _chunks(path: Path) -> Iterator[str]:
    with readable(path), path.open(encoding="utf-8") as file:
        while chunk := file.read(READ_CHARS):
            yield chunk


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with readable(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_CHARS + 1), ""), 1):
            if len(line) > MAX_DOCUMENT_CHARS:
                raise DataError(f"{path}:{number}: a line of more than {MAX_DOCUMENT_CHARS} characters; split it")
            if not line.isspace():
                yield f":{number}", _text_field(line, f"{path}:{number}")


def _text_field(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise DataError(f'{where}: expected an object with a string field "text", such as {{"text": "..."}}')
    return value["text"]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: {_needs('pyarrow')}") from None
    with readable(path):
        try:
            with parquet.ParquetFile(path) as file:
                _check_column(str(path), file.schema_arrow.names)
                kind = file.schema_arrow.field("text").type
                if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                    raise DataError(f'{path}: column "text" holds {clip(str(kind))}, expected strings')
                row = 0
                for batch in file.iter_batches(_ROWS, columns=["text"]):
                    for text in batch.column(0).to_pylist():
                        yield f": row {row}", text
                        row += 1
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not a sound parquet file: {_first_line(error)}; write it again") from None


def _hub_texts(source: str) -> Iterator[tuple[str, Any]]:
    found = _HUB.fullmatch(source)
    if found is None:
        raise DataError(
            f"{clip(source)}: expected hf:org/name[:config][:split], such as hf:Salesforce/wikitext:raw:test"
        )
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: {_needs('datasets')}") from None
    try:
        data = datasets.load_dataset(found["name"], found["config"], split=found["split"] or "train")
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be loaded: {_first_line(error)}") from None
    _check_column(source, data.column_names)
    row = 0
    for batch in data.select_columns("text").iter(_ROWS):
        for text in batch["text"]:
            yield f": row {row}", text
            row += 1


def _check_column(source: str, columns: list[str]) -> None:
    if columns.count("text") != 1:
        raise DataError(f'{source}: expected one column "text", found columns {clip(columns)}')


def _needs(package: str) -> str:
    return f"reading it needs {package}; install it with: pip install 'sparse-serve[data]'"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
