"""Rows of `.json` files: every shape people have, a bit at a time, and what is wrong with a row by its place."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgen.core.errors import DataError
from maskgen.data import sources
from maskgen.data.json_rows import rows
from maskgen.data.sources import documents

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=5)


def read(text: str, read_chars: int = 8, most_chars: int = 10_000) -> list[Any]:
    return [row for _, row in rows(io.StringIO(text), "a.json", read_chars, most_chars)]


@settings(max_examples=150, deadline=None)
@given(objects, st.sampled_from([None, 0, 2]), st.integers(1, 9), st.booleans())
def test_an_array_gives_its_rows_however_it_is_written_and_read(
    wanted: list[Any], indent: int | None, read_chars: int, ascii_only: bool
) -> None:
    assert read(json.dumps(wanted, indent=indent, ensure_ascii=ascii_only), read_chars) == wanted


@settings(max_examples=100, deadline=None)
@given(objects.filter(lambda found: len(found) > 1), st.sampled_from([None, 2]), st.sampled_from(["\n", "", "\n\n "]))
def test_objects_that_follow_each_other_are_rows(wanted: list[Any], indent: int | None, between: str) -> None:
    assert read(between + between.join(json.dumps(row, indent=indent) for row in wanted) + "\n") == wanted


def texts(tmp_path: Path, content: str) -> list[str]:
    (tmp_path / "a.json").write_text(content, "utf-8")
    return ["".join(document) for document in documents(tmp_path / "a.json")]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '{"text": "a"}\n{"text": "b", "id": 2}\n',
        '{"version": 3, "tags": ["x"], "data": [{"text": "a"}, {"text": "b"}]}',
        '{\n "rows": [\n  {"text": "a"},\n  {"text": "b"}\n ]\n}\n',
        '{\n "text": "a"\n}\n{\n "text": "b"\n}',
    ],
)
def test_every_shape(content: str, tmp_path: Path) -> None:
    assert texts(tmp_path, content) == ["a", "b"]
    assert texts(tmp_path, '{"text": "only one"}') == ["only one"]
    assert texts(tmp_path, "[]") == texts(tmp_path, " \n") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text": 3}]', r'a\.json: row 1 \(line 2\): expected an object with a string field "text"'),
        ('[{"text": "a"},\n\n"b"]', r"a\.json: row 1 \(line 3\): expected an object .*, found 'b'"),
        ('[{"text": "a"}\n{"text": "b"}]', r"a\.json:2: not valid JSON: expected '\]', found '\{'"),
        ('[{"text": "a"},\n]', r"a\.json:2: not valid JSON: Expecting value"),
        ('[{"text": "a"}', r"a\.json:1: not valid JSON: expected '\]', found the end of the file"),
        ('[{"text": "a"}] x', r"a\.json:1: not valid JSON: text after the end of the array"),
        ('[{"text": "a"},\n{"text": "b}]', r"a\.json:2: not valid JSON: Unterminated string"),
        ('[{"text": "a"},\n{"text" "b"}]', r"a\.json:2: not valid JSON: Expecting ':' delimiter"),
        ('{"text": "a"}\n{"txt": "b"}', r"a\.json: row 1 \(line 2\): expected .*, found fields \['txt'\]"),
        ('{"text": "a"}\n{"text": "b"', r"a\.json:2: not valid JSON"),
        ('{"text": "a"}\noh', r"a\.json:2: not valid JSON: Expecting value"),
        ('{"text": "a"}\n3', r"a\.json: row 1 \(line 2\): expected an object .*, found 3"),
        ('{"text": ["a", "b"]}', r'a\.json: row 0: expected an object .*, found "text": \[\'a\', \'b\'\]'),
        ('{"id": 3}', r"one object with fields \['id'\], and no list of objects in it; expected rows"),
        ('{"a": [{}], "b": [{}]}', r"and several lists \(\['a', 'b'\]\) of objects in it"),
        ('{"a": [{"text": "x"}, {"t": 1}]}', r"a\.json: a\[1\]: expected an object"),
        ("just text", r"a\.json: begins with 'j'; expected JSON, an array of objects or JSON lines"),
        ("[" * 100_000, r"a\.json:1: not valid JSON: maximum recursion"),
        ('{"a": ' + "9" * 5000 + "}", r"a\.json:1: not valid JSON: Exceeds the limit"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        texts(tmp_path, content)


def test_a_mistake_is_found_where_it_is_and_not_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ_CHARS", 64)
    good = json.dumps({"text": "x" * 50})
    with pytest.raises(DataError, match=r"a\.json:7: not valid JSON: Expecting ':' delimiter"):
        texts(tmp_path, "[\n" + f"{good},\n" * 5 + '{"text" "b"},\n' + f"{good},\n" * 500 + "]")


def test_no_row_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ_CHARS", 16)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    for start in ("[", "", '{"data": ['):
        with pytest.raises(DataError, match=r"a\.json:1: a row of more than 100 characters; split it"):
            texts(tmp_path, start + json.dumps({"text": "x" * 1000}))
