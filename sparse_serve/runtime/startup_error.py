"""Why an engine did not start, from the process that knows to the one that says so.

vLLM builds the model in processes of its own. When one dies, its exception dies with it, and all that reaches the
server is "Engine core initialization failed. See root cause above". So the server names a file in the environment,
which every process inherits, and what the plugin raises on purpose is written there on its way up.
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

logger = logging.getLogger(__name__)

VARIABLE = "_SPARSE_SERVE_STARTUP_ERROR"
"""Environment variable with the file's path; internal, nobody is meant to set it."""


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Write down a `SparseError` that passes, if anybody listens. Of several processes the last one is heard."""
    try:
        yield
    except SparseError as error:
        if path := os.environ.get(VARIABLE):
            with contextlib.suppress(OSError):
                draft = Path(f"{path}.{os.getpid()}")
                draft.write_text(str(error), "utf-8", errors="replace")
                draft.replace(path)
        raise


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], str]]:
    """A function that returns what a process started in here, on this machine, has left; empty if nothing.

    It never fails: a server whose disk is full has other worries. Of calls that overlap, the last one listens.
    """
    try:
        folder = tempfile.mkdtemp(prefix="sparse-serve-")
    except OSError as error:
        logger.warning("reasons of engine processes will be in the log only: %s", error)
        yield lambda: ""
        return
    path = Path(folder) / "startup-error"
    os.environ[VARIABLE] = str(path)
    try:
        yield lambda: _read(path)
    finally:
        if os.environ.get(VARIABLE) == str(path):
            del os.environ[VARIABLE]
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
