"""Where text comes from: files and hub datasets, read as a stream of documents, never whole where that can be avoided.

    files                            see `data.formats` for what their names say: plain text is one document, every row
                                     of .jsonl, .ndjson, .json, .csv, .tsv and .parquet is one
    hf:ORG/NAME[:CONFIG][:SPLIT]     a dataset of the Hugging Face hub; split "train" if none is given, and an empty
                                     CONFIG for the only one (`hf:org/name::validation`)

`data.columns` says which field of a row is read: "text", or a conversation, which the model's chat template renders.

A dataset that brings its own loading script is refused by the `datasets` library: only data is fetched, never code.
Every damaged or hostile file ends in one `DataError` that says where. A document is an iterator of stretches of text,
so that a file of one huge document costs no more memory than any other.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from maskgen.core.errors import DataError, clip
from maskgen.core.failures import machine_failure
from maskgen.data import json_rows
from maskgen.data.columns import column_of, text_of_cell, text_of_row
from maskgen.data.formats import Format, Kind, format_of, instead, needs, open_seekable, open_text

logger = logging.getLogger(__name__)

READ_CHARS = 1 << 19
"""Characters of text read at a time."""

MAX_DOCUMENT_CHARS = 1 << 28
"""Longest row of a file. A row has to be parsed whole; nobody's document is this long."""

HUB_PREFIX = "hf:"
_ROWS = 1024
_MARKUP = re.compile(r"\s*<(\?xml\b|!doctype\b|html\b)", re.IGNORECASE)
"""How HTML and XML begin."""
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_HUB = re.compile(rf"hf:(?P<name>{_PART}/{_PART})(?::(?!$)(?P<config>{_PART})?(?::(?P<split>{_PART}))?)?")


def is_hub(source: Path | str) -> bool:
    """Whether `source` is meant as a hub dataset."""
    return str(source).startswith(HUB_PREFIX)


def documents(source: Path | str, tokenizer: Any = None) -> Iterator[Iterator[str]]:
    """The documents of a source, each to be used up before the next one is asked for. Raises `DataError`.

    `tokenizer` is the model's, whose chat template renders conversations.
    """
    if is_hub(source):
        return _each(_hub_rows(str(source), tokenizer))
    path = Path(source)
    form = format_of(path)
    if form.kind is Kind.TEXT:
        return iter([_chunks(path, form)])
    return _each(_READERS[form.kind](path, form, tokenizer))


def _each(texts: Iterator[str]) -> Iterator[Iterator[str]]:
    """Documents that come in one stretch each."""
    for text in texts:
        yield iter([text])


def _chunks(path: Path, form: Format) -> Iterator[str]:
    """Plain text. A zero byte is in none: it is binary data, or UTF-16, whose half it may look like."""
    with open_text(path, form.packed) as file:
        done = 0
        while chunk := file.read(READ_CHARS):
            if not done:
                _check_plain(path, form, chunk)
            if "\0" in chunk:
                where = done + chunk.index("\0")
                raise DataError(f"{path}: not UTF-8 text (a zero byte at character {where}); {instead(path)}")
            done += len(chunk)
            yield chunk


def _check_plain(path: Path, form: Format, start: str) -> None:
    """Rows of JSON, and markup, are not taken for one document, unless the name says that they are plain text."""
    if _MARKUP.match(start):
        what, advice, question = "markup", "write the text alone to another file", "are its tags meant to be text?"
    elif _is_json(start):
        what, advice = "a JSON object", "name it .json or .jsonl to have its rows read"
        question = "is it a .json or .jsonl file?"
    else:
        return
    if not form.plain:
        raise DataError(f"{path}: begins with {what}; {advice}, or name it .txt to have all of it read as plain text")
    logger.warning("%s: begins with %s, and is read as plain text; %s", path, what, question)


def _is_json(start: str) -> bool:
    try:
        found, _ = json.JSONDecoder().raw_decode(start.lstrip("[ \t\r\n"))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found)


def _lines(path: Path, form: Format, tokenizer: Any) -> Iterator[str]:
    with open_text(path, form.packed) as file:
        for number, line in _bounded_lines(path, file):
            if not line.isspace():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
                yield text_of_row(row, tokenizer, str(path), f":{number}")


def _bounded_lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Numbered lines, none of which fills the memory."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_CHARS + 1), ""), 1):
        if len(line) > MAX_DOCUMENT_CHARS:
            raise DataError(f"{path}:{number}: a line of more than {MAX_DOCUMENT_CHARS} characters; split it")
        yield number, line


def _json(path: Path, form: Format, tokenizer: Any) -> Iterator[str]:
    with open_text(path, form.packed) as file:
        for where, row in json_rows.rows(file, str(path), READ_CHARS, MAX_DOCUMENT_CHARS):
            yield text_of_row(row, tokenizer, str(path), where)


def _table(path: Path, form: Format, tokenizer: Any) -> Iterator[str]:
    """Rows of a .csv or .tsv file, under a line of column names. Quoting that does not end is an error."""
    delimiter = "\t" if form.kind is Kind.TSV else ","
    with open_text(path, form.packed, newline="") as file:
        rows = csv.reader((line for _, line in _bounded_lines(path, file)), delimiter=delimiter, strict=True)
        names = _next_row(rows, path)
        if names is None:
            return
        name = column_of(names, str(path))
        column = names.index(name)
        while (row := _next_row(rows, path)) is not None:
            if len(row) != len(names):
                raise DataError(
                    f"{path}:{rows.line_num}: {len(row)} fields, expected {len(names)} as in the first line"
                )
            yield text_of_cell(name, row[column], tokenizer, str(path), f":{rows.line_num}")


def _next_row(rows: Any, path: Path) -> list[str] | None:
    """The next row that is not empty. The csv module's own limit for a field is one setting of the whole process."""
    limit = csv.field_size_limit(MAX_DOCUMENT_CHARS)
    try:
        return next((row for row in rows if row), None)
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not valid {path.suffix.lower()}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _columns(path: Path, form: Format, tokenizer: Any) -> Iterator[str]:
    """Rows of a .parquet file, read row group by row group."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: {needs('pyarrow')}") from None
    with open_seekable(path, form.packed) as stored:
        try:
            with parquet.ParquetFile(stored) as file:
                name = column_of(file.schema_arrow.names, str(path))
                held = file.schema_arrow.field(name).type
                if name == "text" and not (pyarrow.types.is_string(held) or pyarrow.types.is_large_string(held)):
                    raise DataError(f'{path}: column "text" holds {clip(str(held))}, expected strings')
                row = 0
                for batch in file.iter_batches(_ROWS, columns=[name]):
                    for value in batch.column(0).to_pylist():
                        yield text_of_cell(name, value, tokenizer, str(path), f": row {row}")
                        row += 1
        except pyarrow.ArrowException as error:
            if isinstance(error, MemoryError):
                raise
            raise DataError(f"{path}: not a sound parquet file: {_first_line(error)}; write it again") from None


def _hub_rows(source: str, tokenizer: Any) -> Iterator[str]:
    found = _HUB.fullmatch(source)
    if found is None:
        raise DataError(
            f"{clip(source)}: expected hf:org/name[:config][:split], such as hf:Salesforce/wikitext:raw:test"
        )
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: {needs('datasets')}") from None
    try:
        data = datasets.load_dataset(found["name"], found["config"], split=found["split"] or "train")
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        if (failure := machine_failure(error)) is not None:
            raise failure from None
        raise DataError(f"{source}: cannot be loaded: {_first_line(error)}") from None
    name = column_of(data.column_names, source)
    row = 0
    for batch in data.select_columns(name).iter(_ROWS):
        for value in batch[name]:
            yield text_of_cell(name, value, tokenizer, source, f": row {row}")
            row += 1


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_READERS: dict[Kind, Callable[[Path, Format, Any], Iterator[str]]] = {
    Kind.LINES: _lines,
    Kind.JSON: _json,
    Kind.CSV: _table,
    Kind.TSV: _table,
    Kind.PARQUET: _columns,
}
