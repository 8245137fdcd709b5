"""Text that every CPython carries, cut into training and held-out documents.

Two sources: the language reference behind `help()` (`pydoc_data.topics`) and the docstrings of the standard library,
one document per module. The text differs a little between Python versions and builds, so what is made from it says
which it used.

About a tenth of the documents is held out whole, by a hash of the name. The reference repeats itself a lot and modules
copy from each other, so longer paragraphs are kept once, held-out documents first: no long paragraph of the held-out
text is in the training text.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from maskgen.core.errors import DataError

_SHARED_PARAGRAPH_CHARS = 60
_NOT_PROSE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages", "turtledemo"}


@dataclass(frozen=True)
class Corpus:
    """Documents by name, in name order, after paragraphs that occur twice were dropped."""

    train: Mapping[str, str]
    heldout: Mapping[str, str]


def standard_documents() -> dict[str, str]:
    """The text that comes with this CPython: help topics, and one document of docstrings per module."""
    documents = {f"topics/{name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if name.parts[0].removesuffix(".py") in sys.stdlib_module_names and not _NOT_PROSE & set(name.parts):
            documents[f"docstrings/{name.as_posix()}"] = "\n\n".join(_docstrings(path))
    return documents


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def split(documents: Mapping[str, str]) -> Corpus:
    """About a tenth of the documents held out, by name; `DataError` when either side is empty."""
    names = sorted(name for name, text in documents.items() if text.strip())
    heldout_names = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0}
    seen: set[str] = set()
    heldout = {name: _unseen(documents[name], seen) for name in names if name in heldout_names}
    train = {name: _unseen(documents[name], seen) for name in names if name not in heldout_names}
    if not heldout or not train:
        raise DataError(f"{len(names)} documents cannot be split in two; give a few dozen")
    return Corpus(train, heldout)


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
