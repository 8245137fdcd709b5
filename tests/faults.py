"""Failures of a machine, put where Python meets the operating system: a file that cannot be opened, at the n-th time.

Python tells audit hooks of every file it opens and of every directory it makes, and what a hook raises is what the
caller gets. So a failure is real to the code under test, wherever in a library it happens, and also for root, whom no
permission stops. Files that safetensors opens by itself are not seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Fault:
    """Raise what `error` makes of a path, at access number `first` (from 1) below `folder`, and if `lasts` ever after.

    With `writes`, reading does not count. `accesses` have been seen.
    """

    folder: Path
    error: Callable[[str], BaseException]
    first: int = 0
    lasts: bool = True
    writes: bool = False
    accesses: int = field(default=0, init=False)

    def meet(self, path: str, is_write: bool) -> None:
        """Count an access, and fail if it is time."""
        if self.writes and not is_write:
            return
        self.accesses += 1
        if self.accesses == self.first or (self.lasts and 0 < self.first < self.accesses):
            raise self.error(path)


_active: list[Fault] = []
_installed: list[bool] = []


@contextmanager
def injected(fault: Fault) -> Iterator[Fault]:
    """Let a fault happen inside of this block, in this process."""
    if not _installed:
        sys.addaudithook(_hook)  # there is no way to remove one
        _installed.append(True)
    _active.append(fault)
    try:
        yield fault
    finally:
        _active.clear()


def errno_of(number: int) -> Callable[[str], BaseException]:
    """For `Fault.error`: the operating system's error of this number."""
    return lambda path: OSError(number, os.strerror(number), path)


def closed_pipe() -> TextIO:
    """What `| head` leaves when it has ended."""
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active or event not in ("open", "os.mkdir"):
        return
    path = arguments[0]
    if isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).is_relative_to(_active[0].folder):
        is_write = event == "os.mkdir" or bool((arguments[2] or 0) & _WRITES)
        _active[0].meet(os.fsdecode(path), is_write)
