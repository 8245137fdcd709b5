"""What was measured on this machine, kept for the next process: small JSON files in the user's cache folder.

They are `$XDG_CACHE_HOME/sparse-serve/KIND/DIGEST.json`, or in the folder that the operating system has for caches if
the variable is not set. The digest is that of everything the figures depend on (shape, device, versions, code); the
file holds those facts too, for a person to read. So a new version never meets an old figure, and nothing has to be
invalidated. Several processes may write the same file: each writes it whole.

A cache that cannot be read or written costs time, not the server: everything is measured, and a warning says once why
nothing is kept and what to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from maskgen.core.digest import digest_json
from maskgen.core.errors import SparseError
from maskgen.core.files import read_json, write_json

APP = "sparse-serve"

logger = logging.getLogger(__name__)

_bypassed = ContextVar("_bypassed", default=False)
_warned: set[str] = set()
"""Troubles of this process that a warning was written about."""


@contextlib.contextmanager
def bypass_cache() -> Iterator[None]:
    """Inside, `recall` finds nothing: everything is measured again, and kept in place of what was there."""
    token = _bypassed.set(True)
    try:
        yield
    finally:
        _bypassed.reset(token)


def path(kind: str, facts: Mapping[str, Any]) -> Path:
    """The file for figures of a `kind` with these `facts`. Raises `OSError` where there is no folder for caches."""
    return folder() / kind / f"{digest_json(facts).removeprefix('sha256:')[:32]}.json"


def recall(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `keep` wrote, unchecked; empty if there is nothing, it cannot be read, or `bypass_cache` is in effect."""
    if _bypassed.get():
        return {}
    try:
        file = path(kind, facts)
        return read_json(file) if file.is_file() else {}
    except SparseError as error:
        _warn_once(str(error), "%s; it is measured again", error)
    except OSError as error:
        _warn_once("read", "what was measured before cannot be read, and is measured again: %s", error)
    return {}


def keep(kind: str, facts: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write `figures`, and the facts beside them."""
    try:
        write_json(path(kind, facts), {**facts, **figures})
    except (OSError, UnicodeError) as error:  # UnicodeError: a GPU's name, say, that is not text
        _warn_once(
            "write",
            "what was measured cannot be kept, so every start measures it again: %s; "
            "set XDG_CACHE_HOME to a folder that can be written",
            error,
        )


def folder() -> Path:
    """This project's folder for caches. Raises `OSError` where there is none."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / APP
    try:
        from platformdirs import user_cache_path  # on use: GPU machines that only test kernels may not have it
    except ModuleNotFoundError as error:
        raise OSError(f"XDG_CACHE_HOME is not set, and the package {error.name} is not installed") from None

    try:
        found = user_cache_path(APP, appauthor=False)
    except RuntimeError as error:  # a user without a home
        raise OSError(f"XDG_CACHE_HOME is not set, and there is no home directory ({error})") from None
    if not found.is_absolute():  # the same user, in older releases: `~` was left in it
        raise OSError(f"XDG_CACHE_HOME is not set, and there is no home directory ({found})")
    return found


def _warn_once(trouble: str, message: str, error: Exception) -> None:
    """Every layer of a model meets the same trouble; the first says it."""
    if trouble not in _warned:
        _warned.add(trouble)
        logger.warning(message, error)
