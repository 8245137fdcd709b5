"""`self` as a source of text: what the dense model writes itself (`maskgen.hf.generate`), made once and kept.

    self           128 texts
    self:1000      as many as are asked for

A file of rows in the user's cache folder, under the digest of the model, the number of texts and the versions of what
wrote them. Only whole files have that name; several processes may ask at the same time, and one writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import filelock
import torch

from maskgen.core.digest import digest_json, digest_weights
from maskgen.core.errors import DataError
from maskgen.core.failures import TEMPORARY_SUFFIX, explained
from maskgen.hf import generate, gguf, model

DOCUMENTS = 128
SEED = 0
_SOURCE = re.compile(r"self(?::([1-9]\d{0,6}))?")


def is_own(source: Path | str) -> bool:
    """Whether a source means text that the model writes itself: `self`, or `self:` with a number."""
    return str(source) == "self" or str(source).startswith("self:")


def written(source: Path | str, model_dir: Path, device: str, tell: Callable[[str], None]) -> Path:
    """The file that a source stands for, for the dense model in `model_dir`; written now if it is not there yet.

    `tell` is called with what begins. Raises `DataError` for a number that is none, or a model that writes nothing.
    """
    found = _SOURCE.fullmatch(str(source))
    if found is None:
        raise DataError(f"{source}: expected self, or self:NUMBER with the number of texts, such as self:{DOCUMENTS}")
    documents = int(found[1] or DOCUMENTS)
    versions = {"torch": str(torch.__version__), "transformers": metadata.version("transformers")}
    way = [generate.TEMPERATURE, generate.TOP_P, generate.QUESTION_TOKENS, generate.ANSWER_TOKENS, SEED]
    key = digest_json({"model": digest_weights(model_dir), "documents": documents, "way": way, **versions})
    path = gguf.cache_folder() / "self" / f"{model_dir.name}-{documents}--{key.removeprefix('sha256:')[:16]}.jsonl"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                _write(path, model_dir, documents, device, tell)
    return path


def _write(path: Path, model_dir: Path, documents: int, device: str, tell: Callable[[str], None]) -> None:
    tell(f"writing {documents} texts with the dense model")
    writer = generate.Writer(model.load(model_dir).to(device), model.load_tokenizer(model_dir))
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    with temporary.open("w", encoding="utf-8") as file:
        for row in writer.rows(documents, SEED, lambda done: tell(f"wrote {done} texts of {documents}")):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.rename(path)
