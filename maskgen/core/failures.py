"""Failures of disks, memory and files, in words: the one place that turns what libraries raise into a `SparseError`.

A full disk is an `OSError`, unless safetensors or torch met it first; too little memory is a `MemoryError`, or a
`RuntimeError` that only its text tells from a bug; a file that was cut off is a `SafetensorError` without a name.
`explained` names the thing and says what to do. It passes on what it does not know: that is a bug, and its traceback is
wanted.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from maskgen.core.errors import FormatError, OutOfMemoryError, SparseError, StorageError

TEMPORARY_SUFFIX = ".partial"
"""How names of files and directories end that are renamed when they are whole."""

LOCK_SUFFIX = ".lock"
"""How the name of the file ends that is locked while an output is made; like the others, it begins with a dot."""

_ADVICE = {
    errno.ENOSPC: "make room, or choose an output on another disk, and run the same command again",
    errno.EDQUOT: "free some of the quota, or choose an output on another disk, and run the same command again",
    errno.EFBIG: "the file system or `ulimit -f` allows no file of this size; choose an output elsewhere",
    errno.EROFS: "choose a place on a disk that can be written",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EISDIR: "this is a directory, expected a file",
    errno.EEXIST: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files with `ulimit -n`",
    errno.EIO: "the disk or the network file system fails; choose a place elsewhere",
}
_IN_TEXT = {os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
"""Texts by which such a failure is known when a library passes on its text only."""

_TEMPORARY = re.compile(rf"\A\.(.+?)(?:(?:\.[0-9a-f]{{8}})?{re.escape(TEMPORARY_SUFFIX)}|{re.escape(LOCK_SUFFIX)})\Z")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|not enough memory|out of memory|ALLOC_FAILED")
_LONGEST = 300
"""Characters of what a library says."""

_WANTED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)
_NOT_FILES = (
    ConnectionError, TimeoutError, BlockingIOError, ChildProcessError, ProcessLookupError, InterruptedError,
    socket.gaierror, socket.herror, ssl.SSLError,
)  # fmt: skip
_NETWORK = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}


@contextmanager
def explained(where: Path | str | None = None) -> Iterator[None]:
    """Raise a `SparseError` in place of what a full disk, too little memory or a damaged file makes libraries raise.

    `where` names what is written or read, for errors that do not say it. May decorate a function.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        known = in_words(error, where)
        if known is None or known is error:
            raise
        raise known from None if isinstance(error, SafetensorError) else error


def in_words(error: BaseException, where: Path | str | None = None) -> SparseError | None:
    """The `SparseError` that says what `error` means: itself if it is one, None if it may be a bug."""
    if isinstance(error, SparseError):
        return error
    number = _errno(error)
    if number == errno.ENOMEM or _is_out_of_memory(error):
        return OutOfMemoryError(_memory(error, where))
    if isinstance(error, _NOT_FILES) or number in _NETWORK:
        return None
    if number is not None:
        advice = f"; {_ADVICE[number]}" if number in _ADVICE else ""
        return StorageError(f"{_name(error, where)}{os.strerror(number)}{advice}")
    if isinstance(error, OSError):
        return StorageError(f"{_name(error, where)}{_line(error)}")
    if isinstance(error, SafetensorError):
        return FormatError(
            f"{_name(error, where)}not a valid safetensors file: {_line(error)}; download or write it again"
        )
    return None


def machine_failure(error: BaseException) -> BaseException | None:
    """What failed of the machine (a disk, memory), in place of which a library raised `error`, if anything did.

    None where the files or the network are to blame. That a file is not there is no failure: libraries look for many.
    """
    cause: BaseException | None = error
    while cause is not None:
        known = in_words(cause)
        is_storage = isinstance(known, StorageError) and _errno(cause) not in (None, errno.ENOENT)
        if is_storage or isinstance(known, OutOfMemoryError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def drop_output() -> None:
    """Where standard output cannot be written, let go of what is left of it: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _errno(error: BaseException) -> int | None:
    """The number of an operating system's error, read from its text where it is only there."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if isinstance(error, OSError | SafetensorError) and (found := _OS_ERROR.search(text)):
        return int(found[1])
    return next((number for words, number in _IN_TEXT.items() if words in text), None)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | SafetensorError) and _MEMORY.search(str(error)) is not None


def _memory(error: BaseException, where: Path | str | None) -> str:
    wanted = _WANTED.search(str(error))
    asked = f" ({wanted[1]} more were asked for)" if wanted else ""
    return (
        f"{_name(error, where)}out of memory{asked}; close other programs or use a machine with more, or ask for less "
        "at a time: fewer or shorter windows, a smaller batch"
    )


def _name(error: BaseException, where: Path | str | None) -> str:
    """What the error is about, with a colon: the file it names itself, or `where`; a temporary one by its real name."""
    own = error.filename if isinstance(error, OSError) else None
    name = own if isinstance(own, str | bytes) else where
    if name is None:
        return ""
    parts = (_TEMPORARY.sub(r"\1", part) for part in Path(os.fsdecode(name)).parts)
    return f"{Path(*parts)}: "


def _line(error: BaseException) -> str:
    """Its text, cut where a file put a name of any length or form into it."""
    text = " ".join(str(error).split()) or type(error).__name__
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
