"""The demo's text, split honestly."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskgen.core.errors import DataError
from maskgen.data import demo_text

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


def test_standard_documents_are_topics_and_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json/decoder.py", "site-packages/json.py", "test/test_json.py", "not_in_python.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""Module {name}."""\ndef f():\n    """Function."""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    documents = demo_text.standard_documents()
    assert "assert" in documents["topics/assert"]
    docstrings = {name: text for name, text in documents.items() if not name.startswith("topics/")}
    assert docstrings == {"docstrings/json/decoder.py": "Module json/decoder.py.\n\nFunction."}
