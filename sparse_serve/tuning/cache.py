"""What was measured on this machine, kept for the next process: small JSON files in the user's cache.

A file's name is the digest of everything its figures depend on (shape, device, versions, code), which it also holds for
a person to read. So a new version never meets an old figure, and nothing has to be invalidated. Several processes may
write the same file: each writes it whole. A cache that cannot be read or written costs time and is no error.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from maskgen.core.digest import digest_json
from maskgen.core.errors import SparseError
from maskgen.core.files import read_json, write_json

_bypassed = ContextVar("_bypassed", default=False)


@contextlib.contextmanager
def bypass_cache() -> Iterator[None]:
    """Inside, nothing is recalled: everything is measured again, and kept in place of what was there."""
    token = _bypassed.set(True)
    try:
        yield
    finally:
        _bypassed.reset(token)


def path(kind: str, facts: Mapping[str, Any]) -> Path:
    """Where figures of a `kind` with these `facts` are kept."""
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_dir / "sparse-serve" / kind / f"{digest_json(facts).removeprefix('sha256:')[:32]}.json"


def recall(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `keep` wrote, unchecked; empty if nothing can be read, or all is to be measured again (`bypass_cache`)."""
    if _bypassed.get():
        return {}
    try:
        return read_json(path(kind, facts))
    except (SparseError, OSError, RuntimeError):  # RuntimeError: there is no home
        return {}


def keep(kind: str, facts: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write `figures`, and the facts beside them."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # ValueError: text that is no UTF-8
        write_json(path(kind, facts), {**facts, **figures})


def version(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
