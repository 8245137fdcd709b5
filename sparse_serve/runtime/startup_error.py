"""Passes the error that stopped an engine process at start-up to the server, through a file.

vLLM builds the model in processes of its own. When one dies, its exception dies with it, and all that reaches the
server is "Engine core initialization failed. See root cause above". So the server names a file to the processes it
starts (`environment`), and the plugin writes there what it raises on purpose.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from maskgen.core.errors import SparseError
from sparse_serve.runtime import environment

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def record_startup_error() -> Iterator[None]:
    """Write a `SparseError` raised in here to the server's file, if there is one, and pass it on.

    If several processes fail, the last one's error is kept.
    """
    try:
        yield
    except SparseError as error:
        if path := environment.startup_error_file():
            with contextlib.suppress(OSError):
                draft = Path(f"{path}.{os.getpid()}")
                draft.write_text(str(error), "utf-8", errors="replace")
                draft.replace(path)
        raise


@contextlib.contextmanager
def collect_startup_error() -> Iterator[Callable[[], str]]:
    """Yield a function that returns the error recorded by a process started in here, or `""`.

    Without a place for the file, a full disk say, that is a warning, and the function returns `""`. If calls overlap,
    errors go to the last one.
    """
    try:
        folder = tempfile.mkdtemp(prefix="sparse-serve-")
    except OSError as error:
        logger.warning("if the engine does not start, only its log says why: %s", error)
        yield lambda: ""
        return
    path = Path(folder) / "startup-error"
    environment.set_startup_error_file(path)
    try:
        yield lambda: _read(path)
    finally:
        if environment.startup_error_file() == path:
            environment.set_startup_error_file(None)
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
