"""Says in one line why an engine did not start.

vLLM builds the model in processes of its own. When one dies, its exception dies with it, and all that reaches the
server is "Engine core initialization failed. See root cause above". So the server names a file to the processes it
starts (`environment`), and two things are written there, the first of them only: what the plugin raises on purpose
(`record_startup_error`), and what vLLM logs when one of its processes fails (`record_failed_processes`).

What reaches the server as an exception is often many lines, and the last one an advertisement: `reason` finds the one
that says what was wrong.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from maskgen.core.errors import SparseError
from sparse_serve.runtime import environment

logger = logging.getLogger(__name__)

_LONGEST = 500
_TRACEBACK = "Traceback (most recent call last)"
_VALIDATION = re.compile(r"validation errors? for .+\n(?:(\S.*)\n)?\s+([\s\S]+?) \[type=\w+, input_value=")
_DEAD_PROCESS = re.compile(r"Failed core proc\(s\): \{.*?: (-?\d+)")
_RAISED = re.compile(r"[A-Za-z_][\w.]*: .")
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor", "vllm.model_executor.models.registry")
"""Where vLLM's engine, workers and model inspector log why they fail."""

_SAYS_LITTLE = (LookupError, AttributeError, AssertionError, ArithmeticError, NameError, MemoryError)
"""Errors whose type is needed to understand their text."""


def reason(error: BaseException | str) -> str:
    """What was wrong, in one line of at most 500 characters, from an error or the text of one.

    Of pydantic's errors the first one's message; of a text with a traceback in it, the error that the traceback ends
    with; else the text's first line, and those that finish its sentence.
    """
    if isinstance(error, str):
        return _cut(_in_one_line(error))
    if isinstance(error, ValidationError):
        return _cut(_of_validation(error))
    text = _in_one_line(str(error))
    if not text:
        return _cut(f"{type(error).__name__}{_place(error)}")
    return _cut(f"{type(error).__name__}: {text}" if isinstance(error, _SAYS_LITTLE) else text)


@contextlib.contextmanager
def record_startup_error() -> Iterator[None]:
    """Write a `SparseError` raised in here to the server's file, if there is one, and pass it on."""
    try:
        yield
    except SparseError as error:
        _record(error)
        raise


def record_failed_processes() -> None:
    """Write to the server's file, if there is one, why a process of vLLM's does not start; vLLM only logs it.

    Call it in every process; calling it again does nothing. A filter, as vLLM resets its loggers' handlers.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_record_logged)


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


def _record_logged(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        _record(error)
    return True


def _record(error: BaseException) -> None:
    path = environment.startup_error_file()
    if path is None or path.exists():
        return
    with contextlib.suppress(OSError):
        draft = Path(f"{path}.{os.getpid()}")
        draft.write_text(reason(error), "utf-8", errors="replace")
        draft.replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _of_validation(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] in ("value_error", "assertion_error"):
        return _in_one_line(first["msg"].partition(", ")[2])
    where = ".".join(map(str, first["loc"]))
    return f"{where} is {first['input']!r}: {_in_one_line(first['msg'])}"


def _in_one_line(text: str) -> str:
    """The line of a text that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    if validation := _VALIDATION.search(text):
        field, message = validation.groups(default="")
        return f"{field}: {' '.join(message.split())}".removeprefix(": ").replace("Value error, ", "", 1)
    if dead := _DEAD_PROCESS.search(text):
        return f"vLLM's engine process {_ending(int(dead[1]))}"
    if any(line.startswith(_TRACEBACK) for line in lines):
        raised = [line for line in lines if _RAISED.match(line) and not line.startswith("File ")]
        return raised[-1] if raised else lines[-1]
    goes_on = 2 if lines[0].endswith((":", ",")) else 1
    whole = next((number for number, line in enumerate(lines, 1) if line.endswith((".", "!", "?"))), goes_on)
    return " ".join(lines[:whole]).removeprefix("Error: ")


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status} and did not say why"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"was killed by {name}" + (", probably as memory ran out" if name == "SIGKILL" else "")


def _place(error: BaseException) -> str:
    """Where an error without a text was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" in {frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
