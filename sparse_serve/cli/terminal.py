"""Where `sparse-serve serve` prints: a few lines for a person, and everything else to a log file.

vLLM and its libraries log, print and write from C++, in this process and in those it starts. So it is not loggers that
are redirected but the file descriptors 1 and 2, which every child inherits; copies of the old ones are kept for our own
lines. They stay redirected until the process has ended, as some libraries print on the way out.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

import platformdirs
import psutil

_KEPT_LOGS = 20


@dataclass(frozen=True)
class Terminal:
    """The streams for our own lines, and the log file of everything else (None: it goes to the same streams)."""

    out: TextIO
    err: TextIO
    log: Path | None

    def say(self, text: str) -> None:
        """Print an answer, on standard output."""
        _print(text, self.out)

    def restore(self) -> None:
        """Let this process, and a program that takes its place, print to where it printed before."""
        if self.log is not None:
            os.dup2(self.out.fileno(), 1)
            os.dup2(self.err.fileno(), 2)

    def note(self, text: str) -> None:
        """Print progress, a warning or an error, on standard error."""
        _print(text, self.err)


def plain() -> Terminal:
    """No log file: everything is printed."""
    return Terminal(sys.stdout, sys.stderr, None)


def redirected(folder: Path | None = None) -> Terminal:
    """Send all output of this process, and of the processes it will start, to a new file in `folder`.

    `folder` is by default the user's folder for logs (below `$XDG_STATE_HOME`, `~/.local/state`). The newest
    `_KEPT_LOGS` files are kept, and those of running servers. If no file can be written there, that is said and
    everything is printed.
    """
    try:
        folder = folder or _users_folder()
        path = folder / f"serve-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        terminal = plain()
        terminal.note(f"no log file, so the log is printed: {error}")
        return terminal
    _prune(folder)
    terminal = Terminal(_moved(sys.stdout, 1, file), _moved(sys.stderr, 2, file), path)
    os.close(file)
    return terminal


def _users_folder() -> Path:
    """The user's folder for logs; `OSError` if there is none."""
    try:
        folder = platformdirs.user_log_path("sparse-serve", appauthor=False)
    except RuntimeError as error:  # a user without a home
        raise OSError(f"{error}; or print the log with --verbose") from None
    if not folder.is_absolute():  # the same user, in older releases: `~` was left in it
        raise OSError(f"{folder} is no absolute folder; set XDG_STATE_HOME to one, or print the log with --verbose")
    return folder


def _moved(stream: TextIO, number: int, file: int) -> TextIO:
    """Point the descriptor `number`, which `stream` writes to, at `file`; returns a stream to where it pointed."""
    stream.flush()
    kept = os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(file, number)
    return kept


def _prune(folder: Path) -> None:
    """Delete the oldest logs; a name ends in the id of the process that wrote it."""
    for old in sorted(folder.glob("serve-*-*-*.log"))[:-_KEPT_LOGS]:
        pid = old.stem.rpartition("-")[2]
        if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            with contextlib.suppress(OSError):
                old.unlink()


def _print(text: str, stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed; the server goes on
        print(text, file=stream, flush=True)
