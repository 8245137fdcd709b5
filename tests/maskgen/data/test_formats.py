"""What names say of files, compressed files, and what is refused by name rather than read as something else."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from maskgen.core.errors import DataError
from maskgen.data import formats
from maskgen.data.formats import Format, Kind, format_of
from maskgen.data.sources import documents

TEXTS = ["the river", "saw é boats\r\nand lamps"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zst,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def stored(kind: str) -> bytes:
    """`TEXTS` as a file of this kind."""
    if kind == ".parquet":
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"id": [1, 2], "text": TEXTS}), sink)
        return bytes(sink.getvalue())
    return {
        ".jsonl": LINES,
        ".ndjson": LINES,
        ".json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
        ".csv": f'id,text\r\n1,{TEXTS[0]}\r\n2,"{TEXTS[1]}"\r\n'.encode(),
        ".tsv": f'text\tid\n{TEXTS[0]}\t1\n"{TEXTS[1]}"\t2\n'.encode(),
    }[kind]


def texts(path: Path) -> list[str]:
    return ["".join(document) for document in documents(path)]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_rows_are_read_whatever_the_case_and_the_compression(
    kind: str, packed: str, case: Callable[[str], str], tmp_path: Path
) -> None:
    path = tmp_path / f"a{case(kind + packed)}"
    path.write_bytes(PACKERS[packed](stored(kind)))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "wikitext2.test", "a.TXT", "v1.5"])
def test_plain_text_is_one_document(name: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / (name + packed)
    path.write_bytes(PACKERS[packed](b"\xef\xbb\xbfone\n\n\xc3\xa9 two\n"))
    assert texts(path) == ["one\n\né two\n"], "a byte-order mark is no text"


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_passed_over(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + stored(kind))
    assert texts(path) == TEXTS


def test_members_and_frames_that_follow_each_other_are_one_file(tmp_path: Path) -> None:
    for packed in (".gz", ".zst", ".bz2", ".xz"):
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(PACKERS[packed](LINES) + PACKERS[packed](LINES))
        assert texts(path) == TEXTS * 2


@pytest.mark.parametrize(
    "name", ["a.arrow", "a.zip", "a.PDF", "a.docx", "a.bin", "a.pt", "a.pkl", "a.tar.gz", "a.tgz", "a.npz", "a.xlsx"]
)
def test_what_is_no_text_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("perfectly good text", "utf-8")
    with pytest.raises(DataError, match=r"\.\w+ files are not read; give plain text, .*\.parquet"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["a.html", "a.HTM", "a.xml", "a.yaml", "a.yml.gz", "a.svg", "a.srt", "a.toml", "a.ipynb"]
)
def test_text_between_other_things_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACKERS[".gz" if name.endswith("gz") else ""](b"perfectly good text"))
    with pytest.raises(DataError, match=r"text in \.\w+ files is not told from .*; write the text alone to a \.txt"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.log", "a.rst", "a.py", "a.cpp", "a.tex", "a.sql"])
def test_text_of_other_names_is_plain(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x < y\n<p>\n", "utf-8")
    assert texts(tmp_path / name) == ["x < y\n<p>\n"]


@pytest.mark.parametrize("start", ["<!DOCTYPE html>", "\n <html lang='en'>", "<?xml version='1.0'?>"])
def test_markup_under_another_name_is_not_read_as_text(
    start: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("page", "page.php", "page.1"):
        (tmp_path / name).write_text(f"{start}<p>a</p>", "utf-8")
        with pytest.raises(DataError, match=rf"{name}: begins with markup; write the text alone .*, or name it \.txt"):
            texts(tmp_path / name)
    (tmp_path / "page.txt").write_text(f"{start}<p>a</p>", "utf-8")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path / "page.txt") == [f"{start}<p>a</p>"]
    assert "begins with markup, and is read as plain text" in caplog.text


@pytest.mark.parametrize("name", ["a.npy.gz", "a.safetensors.zst", "a.jsonl.gz.gz"])
def test_what_is_not_unpacked(name: str) -> None:
    with pytest.raises(DataError, match=r"inside of \.\w+ is not read; unpack it first"):
        format_of(Path(name))


def test_formats_by_name() -> None:
    assert format_of(Path("x/a.tar/b.JSONL.Gz")) == Format(Kind.LINES, ".gz")
    assert format_of(Path("a.NPY")).kind == Kind.NUMPY
    assert format_of(Path(".txt")) == Format(Kind.TEXT), "a hidden file without a suffix"
    assert format_of(Path("a.txt.xz")) == Format(Kind.TEXT, ".xz", plain=True)


@pytest.mark.parametrize("start", ["", " \n", "[", "[\n  "])
def test_rows_under_another_name_are_not_read_as_one_text(
    start: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = f'{start}{{"text": "a"}}\n{{"text": "b"}}\n'
    for name in ("rows", "rows.data", "rows.jsonl.1", "rows.gz"):
        (tmp_path / name).write_bytes(PACKERS[".gz"](rows.encode()) if name.endswith("gz") else rows.encode())
        with pytest.raises(DataError, match=rf"{name}: begins with a JSON object; name it \.json or \.jsonl"):
            texts(tmp_path / name)
    (tmp_path / "rows.txt").write_text(rows, "utf-8")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path / "rows.txt") == [rows]
    assert "begins with a JSON object, and is read as plain text" in caplog.text


@pytest.mark.parametrize("content", ["{}\nx", "{curly} braces", "[1] a footnote", '"quoted"', "{'text': 1}"])
def test_text_that_only_looks_like_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(content, "utf-8")
    assert texts(tmp_path / "a") == [content]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grün".encode("latin-1"), r"not UTF-8 text \(.*\); convert it to UTF-8"),
        ("text".encode("utf-16"), r"not UTF-8 text"),
        ("plain".encode("utf-16-le"), r"not UTF-8 text \(a zero byte at character 1\); convert it"),
        (gzip.compress(b"text", mtime=0), r"not UTF-8 text \(.*\); it begins like a \.gz file: name it so"),
        (zst(b"text" * 50), r"it begins like a \.zst file"),
        (lzma.compress(b"text"), r"it begins like a \.xz file"),
        (b"PAR1\x15\x00text", r"a zero byte at character 5\); it begins like a \.parquet file: name it so"),
    ],
)
def test_what_is_not_utf8(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt: .*{message}"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("packed", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "other", "plain"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".parquet"])
def test_damaged_compressed_files_are_one_data_error(packed: str, damage: str, kind: str, tmp_path: Path) -> None:
    content = LINES if kind == ".txt" else stored(kind)
    whole = PACKERS[packed](content)
    wrong = {"cut": whole[:-6], "other": whole[:4] + b"\xff" * 8 + whole[12:], "plain": content}[damage]
    (tmp_path / f"a{kind}{packed}").write_bytes(wrong)
    with pytest.raises(DataError, match=rf"a\{kind}\{packed}: not a sound \{packed} file: .*; write it again"):
        texts(tmp_path / f"a{kind}{packed}")


@pytest.mark.parametrize("packed", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_what_unpacks_to_an_absurd_size_is_refused(
    packed: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "FREE_BYTES", 1 << 16)
    (tmp_path / f"a{kind}{packed}").write_bytes(PACKERS[packed](b" " * (8 << 20)))
    with pytest.raises(DataError, match=r"unpacks to more than 200 times its size"):
        texts(tmp_path / f"a{kind}{packed}")
