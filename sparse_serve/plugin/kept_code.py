"""Folders of compiled code: those of the models that were started last stay, older ones are removed.

vLLM keeps what torch compiled in a folder for each key, and removes none; a model has a new key for every checkpoint,
place, flag, kernel and version. Each folder that a process of ours looks into gets a file `OURS`. Its time is that of
the last start, and a process holds a lock on it for as long as it lives, so that no folder is removed whose code is in
use. Folders without that file are stock vLLM's, and stay.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT = 16
"""Folders beside those in use; one of a model of 135 million weights takes 11 MB."""

OURS = "sparse-serve"

_held: dict[str, int] = {}
"""The locks of this process: descriptors of `OURS`, by folder."""


def use(folder: Path) -> None:
    """Say that this process uses `folder`, which is made if need be, and remove the oldest of those beside it.

    Raises `OSError` where that cannot be done.
    """
    if str(folder) not in _held:
        _held[str(folder)] = _lock(folder)
    os.utime(folder / OURS)
    marked = [(file.stat().st_mtime, file.parent) for file in folder.parent.glob(f"*/{OURS}")]
    for _, other in sorted(marked, reverse=True)[KEPT:]:
        with _unused(other) as is_unused:
            if is_unused:
                shutil.rmtree(other)


def _lock(folder: Path) -> int:
    """A descriptor with a shared lock on the folder's `OURS`; waits for whoever is removing the folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / OURS, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            if os.path.samestat((folder / OURS).stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # it was removed meanwhile


@contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether no process holds the lock of a folder; inside, none gets it."""
    descriptor = os.open(folder / OURS, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
