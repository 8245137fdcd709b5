"""Documents from files and hub datasets, and what damaged or hostile ones end in."""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from maskgen.core.errors import DataError, OutOfMemoryError, StorageError
from maskgen.core.failures import explained
from maskgen.data import sources
from maskgen.data.sources import documents


def texts(source: Path | str) -> list[str]:
    return ["".join(document) for document in documents(source)]


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_parquet_rows_are_documents_in_order_over_row_groups(tmp_path: Path) -> None:
    rows = [f"row é {number}" for number in range(10)]
    assert texts(write_parquet(tmp_path / "a.parquet", id=list(range(10)), text=rows)) == rows
    large = pyarrow.array(rows, pyarrow.large_string())
    assert texts(write_parquet(tmp_path / "b.parquet", text=large)) == rows


def test_text_is_read_a_stretch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ_CHARS", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße\r\naus Köln, wo es regnet\r".encode())
    (document,) = documents(path)
    stretches = list(document)
    assert max(map(len, stretches)) == 7
    assert "".join(stretches) == "Grüße\naus Köln, wo es regnet\n"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, r"expected one column \"text\", or one \"messages\", found columns \['body'\]"),
        ({"text": [1, 2]}, r'column "text" holds \'int64\', expected strings'),
        ({"text": [["x"]]}, r'column "text" holds \'list'),
        ({"text": ["a", "b", "c", None]}, r'a\.parquet: row 3: "text" is None, expected a string'),
        ({"text": [b"a"]}, r"holds 'binary'"),
    ],
)
def test_parquet_that_is_no_text(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(write_parquet(tmp_path / "a.parquet", **columns))


@pytest.mark.parametrize("damage", ["empty", "short", "middle", "end"])
def test_damaged_parquet_is_one_data_error(tmp_path: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[f"row {number} " * 50 for number in range(100)])
    data = bytearray(path.read_bytes())
    if damage == "empty":
        data.clear()
    elif damage == "short":
        del data[len(data) // 2 :]
    elif damage == "middle":
        data[4:300] = bytes(296)
    else:
        data[-8:-4] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: "):
        texts(path)


def test_strings_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).cast(pyarrow.binary())
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, raw.buffers())
    with pytest.raises(DataError, match=r"a\.parquet: not UTF-8 text"):
        texts(write_parquet(tmp_path / "a.parquet", text=bad))
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "\\ud83d alone"}\n', "utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2: half of a surrogate pair at character 0"):
        texts(tmp_path / "a.jsonl")


def test_jsonl_of_absurd_depth_or_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * 200_000 + "\n", "utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not valid JSON"):
        texts(path)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 30)
    path.write_text('{"text": "short"}\n{"text": "this one is far too long"}\n', "utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2: a line of more than 30 characters"):
        texts(path)


@pytest.mark.parametrize("name", ["a", "a.jsonl", "a.parquet"])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        texts(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        texts(tmp_path / name)
    os.mkfifo(tmp_path / f"pipe-{name}")
    with pytest.raises(DataError, match="not a regular file"):
        texts(tmp_path / f"pipe-{name}")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:some-org/a.set", ("some-org/a.set", None, "train")),
        ("hf:org/name:raw-v1", ("org/name", "raw-v1", "train")),
        ("hf:org/name:raw-v1:test", ("org/name", "raw-v1", "test")),
        ("hf:org/name::validation", ("org/name", None, "validation")),
    ],
)
@pytest.mark.parametrize("as_path", [False, True])
def test_a_hub_id_says_what_to_load(
    source: str, asked: tuple[str, str | None, str], as_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        seen.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one", "two"], "label": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(Path(source) if as_path else source) == ["one", "two"]
    assert seen == [asked]


@pytest.mark.parametrize(
    "source",
    ["hf:", "hf:name", "hf:org/name:", "hf:org/name:a:b:c", "hf:org/name:a:", "hf:../name", "hf:org/name/x",
     "hf:org/name@main", "hf:org/na me", "hf:https://host/x", "hf:org/name:train[:1%]", "hf:/etc/passwd", "hf:org/\nx"],
)  # fmt: skip
def test_hub_ids_are_a_closed_syntax(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="expected hf:org/name"):
        texts(source)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'org/name' on the Hub (LocalEntryNotFoundError)"),
        ValueError("BuilderConfig 'x' not found. Available: ['y']\nmore"),
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
        datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^hf:org/name: cannot be loaded: [^\n]+$"):
        texts("hf:org/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"body": ["x"]}))
    with pytest.raises(DataError, match='hf:org/name: expected one column "text"'):
        texts("hf:org/name")


def test_what_fails_of_the_machine_is_not_put_down_to_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetGenerationError("while generating") from OSError(errno.ENOSPC, "x", "/cache")

    def exhaust(*_: Any, **__: Any) -> None:
        raise pyarrow.lib.ArrowMemoryError("malloc of size 9 failed")

    monkeypatch.setattr(datasets, "load_dataset", fill)
    with pytest.raises(StorageError, match=r"^/cache: No space left on device"), explained():
        texts("hf:org/name")
    path = write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", exhaust)
    with pytest.raises(OutOfMemoryError), explained():
        texts(path)


@pytest.mark.parametrize(("source", "package"), [("a.parquet", "pyarrow"), ("hf:org/name", "datasets")])
def test_a_missing_package_is_named(source: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf"needs {package}; install it with: pip install 'sparse-serve\[data\]'"):
        texts(source)
