"""The internal environment variables that a server passes to its child processes.

vLLM starts its engine, its workers and its model inspector itself, and hands them its own configuration only. The
environment is what every child inherits, whoever starts it, so these facts travel there. All of the variables are
in this file. They are internal, which their leading underscore says: nobody is meant to set them, and `Settings` does
not take them for its own.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_KERNEL_PARITY = "_SPARSE_SERVE_KERNEL_PARITY"
_LEADER = "_SPARSE_SERVE_LEADER"
_RESTARTS = "_SPARSE_SERVE_RESTARTS"
_STARTUP_ERROR = "_SPARSE_SERVE_STARTUP_ERROR"
_VERIFIED = "_SPARSE_SERVE_VERIFIED"

_SET_BY_A_START = ("_SPARSE_SERVE_", "VLLM_", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_CACHE_DIR")
"""What the names of variables that starting an engine sets begin with."""


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put the variables that starting an engine sets back as they were before.

    vLLM and torch read some of them once, when they are imported, and go by that as long as the process lives.
    """
    before = _set_by_a_start()
    try:
        yield
    finally:
        for name in _set_by_a_start().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _set_by_a_start() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_SET_BY_A_START)}


def kernel_parity_folder() -> Path | None:
    """Where a process that loads sparse layers writes how exact their kernels are (`tuning.parity_file`), or None if
    nobody asks."""
    text = os.environ.get(_KERNEL_PARITY)
    return Path(text) if text else None


@contextlib.contextmanager
def kernel_parity(folder: Path) -> Iterator[None]:
    """Name that folder to the processes started meanwhile."""
    os.environ[_KERNEL_PARITY] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_KERNEL_PARITY, None)


def leader() -> int | None:
    """Id of the process with which this one is to end (`processes`), or None."""
    text = os.environ.get(_LEADER)
    return int(text) if text else None


def set_leader(pid: int) -> None:
    """Name the process with which those started from here on are to end."""
    os.environ[_LEADER] = str(pid)


def restarts() -> int:
    """How often this server has been started again because its engine was lost (`cli.restart`)."""
    return int(os.environ.get(_RESTARTS, "0"))


def set_restarts(count: int) -> None:
    """Hand that number on to the program that takes this one's place."""
    os.environ[_RESTARTS] = str(count)


def startup_error_file() -> Path | None:
    """Where an engine process writes why it could not start (`startup_error`), or None if nobody would read it."""
    text = os.environ.get(_STARTUP_ERROR)
    return Path(text) if text else None


def set_startup_error_file(path: Path | None) -> None:
    """Name that file to the processes started from here on, or with None take it back."""
    if path is None:
        os.environ.pop(_STARTUP_ERROR, None)
    else:
        os.environ[_STARTUP_ERROR] = str(path)


def verified_files() -> str | None:
    """Digest of the files of the checkpoint that was verified last (`plugin.config.verify`), or None."""
    return os.environ.get(_VERIFIED)


def set_verified_files(digest: str) -> None:
    """Keep that digest for the processes started from here on: API servers that vLLM starts do not verify again."""
    os.environ[_VERIFIED] = digest
