"""Why an engine did not start, from the process that knows to the one that says so.

vLLM builds the model in processes of its own. When one dies, its exception dies with it, and all that reaches the
server is "Engine core initialization failed. See root cause above". So the server names a file in the environment,
which every process inherits, and what the plugin raises on purpose is written there on its way up.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from maskgen.core.errors import SparseError

VARIABLE = "SPARSE_SERVE_LAST_WORDS"
"""Environment variable with the file's path; internal, nobody is meant to set it."""


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Write down a `SparseError` that passes, if anybody listens. Of several processes the last one is heard."""
    try:
        yield
    except SparseError as error:
        if path := os.environ.get(VARIABLE):
            with contextlib.suppress(OSError):
                Path(path).write_text(str(error), "utf-8", errors="replace")
        raise


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], str]]:
    """A function that returns what a process started in here has left; empty if nothing."""
    with tempfile.TemporaryDirectory(prefix="sparse-serve-") as folder:
        path, before = Path(folder) / "last-words", os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(path)
        try:
            yield lambda: path.read_text("utf-8") if path.exists() else ""
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
