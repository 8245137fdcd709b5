"""Which field of a row is read, tables in text files, and what to do about rows that have none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from maskgen.core.errors import DataError
from maskgen.data import sources
from maskgen.data.sources import documents


def texts(path: Path) -> list[str]:
    return ["".join(document) for document in documents(path)]


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def test_text_is_read_where_there_is_a_conversation_too(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "no"}], "text": "yes"}
    assert texts(write(tmp_path / "a.jsonl", json.dumps(row))) == ["yes"]
    assert texts(write(tmp_path / "a.csv", "messages,text\n[],yes\n")) == ["yes"]


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        (["prompt", "response"], True),
        (["instruction", "input", "output"], True),
        (["Question", "Answer"], True),
        (["id", "body"], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_without_text_are_refused_and_pairs_with_what_to_do(
    suffix: str, fields: list[str], hint: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({name: ["x"] for name in fields}), path)
    elif suffix == ".csv":
        write(path, ",".join(fields or ["id"]) + "\n")
    else:
        row = dict.fromkeys(fields, "x")
        write(path, json.dumps([row] if suffix == ".json" else row))
    with pytest.raises(DataError, match=r'expected .* "text", .*, found (fields|columns) \[') as error:
        texts(path)
    assert all(repr(name) in str(error.value) for name in fields)
    assert ('not joined by guess: write them as one "text", or as "messages": [{"role"' in str(error.value)) == hint


def test_a_table_is_read_as_it_was_quoted(tmp_path: Path) -> None:
    rows = ["plain", 'with "quotes", and commas', "lines\r\nand\nmore", "", " ends with spaces "]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([number, row] for number, row in enumerate(rows))])
    assert texts(tmp_path / "a.csv") == rows
    assert texts(write(tmp_path / "a.tsv", "text\tid\r\n1, 2\t3\r\n\r\n")) == ["1, 2"], "empty lines are no rows"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,id\na,1\nb\n", r"a\.csv:3: 1 fields, expected 2 as in the first line"),
        ("text,id\na,1\nb,2,3\n", r"a\.csv:3: 3 fields, expected 2"),
        ('text,id\na,1\n"b,2\nc,3\n', r"a\.csv:4: not valid \.csv: unexpected end of data"),
        ('text,id\n"a"x,1\n', r"a\.csv:2: not valid \.csv: ',' expected after '\"'"),
        ("text;id\na;1\n", r"a\.csv: expected one column \"text\", or one \"messages\", found columns \['text;id'\]"),
        ("text,text\na,b\n", r"a\.csv: expected one column \"text\""),
        ("a,b\n\0,c\n", r"a\.csv: expected one column"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / "a.csv", content))


def test_long_fields_are_read_and_the_limit_of_the_process_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    found = documents(write(tmp_path / "a.csv", f'text\n"{long}\n"\nshort\n'))
    assert ["".join(document) for document in found] == [long + "\n", "short"]
    assert csv.field_size_limit() == before
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    with pytest.raises(DataError, match=r"a\.csv:2: a line of more than 100 characters"):
        texts(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.csv:\d+: not valid \.csv: field larger than field limit \(100\)"):
        texts(write(tmp_path / "a.csv", 'text\n"' + "x\n" * 100 + '"\n'))
    assert csv.field_size_limit() == before
