"""One writer for each output: a lock that ends with its process, however that ends.

The lock is on `.NAME.lock` beside the output, which names its holder for others to read. A holder that is killed leaves
the file, not the lock: the next one takes it over. Works between hosts that share a folder as far as their file system
passes `flock` on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskgen.core.errors import OutputExistsError
from maskgen.core.failures import LOCK_SUFFIX, explained

_HOLDER_BYTES = 200


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Be the only process that makes `out`. Its parent directories are made, and removed again if they stay empty.

    Raises `OutputExistsError`, naming the holder, when another process is at work on it, and `StorageError`.
    """
    with explained(out):
        missing = [folder for folder in out.parents if not folder.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}{LOCK_SUFFIX}")
    try:
        with explained(out):
            descriptor = _acquire(path, out)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


def _acquire(path: Path, out: Path) -> int:
    """The descriptor of the locked file, which is the one that has the name `path` now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputExistsError(
                    f"{out}: {_holder(descriptor)} is writing it; wait for it, or choose another output"
                ) from None
            if _is_still(path, descriptor):  # its last holder may have removed it between our two calls
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                undo.pop_all()
                return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Who holds the lock, as that process has written it."""
    text = os.pread(descriptor, _HOLDER_BYTES, 0).decode("utf-8", errors="replace")
    return text if text.startswith("process ") and text.isprintable() else "another process"
