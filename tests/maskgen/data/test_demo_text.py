"""The demo's text, split honestly."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import pytest

from maskgen.core.digest import digest_file
from maskgen.core.errors import DataError
from maskgen.data import demo_text
from maskgen.data.packaged import PackagedFile

WORDS = ("list", "class", "object", "method", "string", "module", "number", "value")
DOCUMENTS = {
    f"doc/{number}": "\n\n".join(
        f"The {WORDS[(number + line) % 8]} number {line} of document {number} is a {WORDS[line % 8]}, we know."
        for line in range(20)
    )
    for number in range(40)
}


def test_heldout_paragraphs_are_not_calibrated_on() -> None:
    shared = "This paragraph stands in every single document, and it is long enough to be recognised again."
    corpus = demo_text.split({name: f"{text}\n\n{shared}\n\nshort" for name, text in DOCUMENTS.items()})
    assert corpus.heldout.keys() | corpus.train.keys() == DOCUMENTS.keys()
    assert not corpus.heldout.keys() & corpus.train.keys()
    assert sum(text.count(shared) for text in corpus.heldout.values()) == 1
    assert not any(shared in text for text in corpus.train.values())
    assert all(text.endswith("short") for text in corpus.train.values())


def test_the_split_depends_on_names_only() -> None:
    backwards = dict(reversed(DOCUMENTS.items()))
    assert demo_text.split(backwards) == demo_text.split(DOCUMENTS)


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(DataError, match="1 documents"):
        demo_text.split({"one": "text", "empty": " "})


def test_docstrings_are_those_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json/decoder.py", "site-packages/json.py", "test/test_json.py", "not_in_python.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""Module {name}."""\ndef f():\n    """Function."""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert demo_text.docstring_documents() == {"json/decoder.py": "Module json/decoder.py.\n\nFunction."}


def test_rows_are_documents_and_damaged_or_short_news_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = "A thing happened, and people talked about it.    " * 20
    stories = {"1": ("One", story), "2": ("Two", "Short."), "3": ("Three", f'{story} He said "?and left.')}
    news = [{"article_id": name, "title": title, "text": text} for name, (title, text) in stories.items()]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo_text, "NEWS", packed(tmp_path, "news", news))
    monkeypatch.setattr(
        demo_text, "PARLIAMENT", packed(tmp_path, "parliament", [{"parlspeech_row": "7", "text": "Hear!"}])
    )
    kept = demo_text.news_documents()
    assert kept.keys() == {"1"} and kept["1"].startswith("One\n\nA thing happened, and people talked about it.\n\nA")
    domains = demo_text.domains()
    assert domains.keys() == {"news", "parliament", "topics", "docstrings"}
    assert domains["parliament"] == {"7": "Hear!"} and "assert" in domains["topics"]["assert"]


def packed(folder: Path, name: str, rows: list[dict[str, str]]) -> PackagedFile:
    """Rows in a file like those of the real package, which is taken for installed."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path = folder / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.csv", text.getvalue())
    info = folder / "package-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: package\nVersion: 1\n")
    return PackagedFile("package", "1", path.name, digest_file(path), "text")
