"""Errors of disks, memory and files in words, from what libraries really raise: one line that names the thing."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from maskgen.core.errors import FormatError, OutOfMemoryError, OutputExistsError, SparseError, StorageError
from maskgen.core.failures import explained, in_words, machine_failure
from tests.maskgen.training import largest_file

ROOT = Path(__file__).parents[3]


def text_of(error: BaseException, where: Path | str | None = None) -> str:
    known = in_words(error, where)
    assert known is not None
    return str(known)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device; make room"),
        (errno.EDQUOT, "Disk quota exceeded; free some of the quota"),
        (errno.EROFS, "Read-only file system; choose a place"),
        (errno.EACCES, "Permission denied; change its permissions"),
        (errno.EMFILE, "Too many open files; allow more"),
        (errno.ESTALE, "Stale file handle"),
    ],
)
def test_errors_of_the_operating_system_name_the_file_and_say_what_to_do(number: int, advice: str) -> None:
    assert text_of(OSError(number, os.strerror(number), "/data/x")).startswith(f"/data/x: {advice}")
    assert text_of(OSError(number, os.strerror(number)), "out").startswith(f"out: {advice}")
    assert isinstance(in_words(OSError(number, os.strerror(number))), StorageError)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("models/.out.partial/part-00000", "models/out/part-00000"),
        ("models/.report.html.0123abcd.partial", "models/report.html"),
        ("models/out.partial", "models/out.partial"),
        ("models/.out.lock", "models/out"),
        ("models/poetry.lock", "models/poetry.lock"),
    ],
)
def test_temporary_names_are_shown_as_what_they_become(name: str, shown: str) -> None:
    assert text_of(OSError(errno.ENOSPC, "No space left on device", name)).startswith(f"{shown}: No space")


def test_what_safetensors_met_when_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with largest_file(1000), pytest.raises(SafetensorError) as raised:
        save_file({"a": torch.zeros(10_000)}, path)
    assert text_of(raised.value, path).startswith(f"{path}: File too large; ")
    assert isinstance(in_words(raised.value), StorageError)


def test_what_safetensors_met_when_it_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(10)}, path)
    os.truncate(path, 50)
    damaged = pytest.raises(FormatError, match=rf"{path}: not a valid safetensors file: .*; download or write it again")
    with damaged, explained(path), safe_open(path, framework="pt"):
        pass


TOO_MUCH = """
import resource, torch
from maskgen.core.failures import explained
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
for allocate in (lambda: torch.empty(1 << 30, dtype=torch.uint8), lambda: bytearray(1 << 30)):
    try:
        with explained("model"):
            allocate()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_too_little_memory_of_torch_and_of_python() -> None:
    """Real ones, in a process that may not have more."""
    done = subprocess.run(
        [sys.executable, "-c", TOO_MUCH], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    torchs, pythons = done.stdout.splitlines()
    assert re.match(r"OutOfMemoryError model: out of memory \(1073741824 bytes more were asked for\); ", torchs)
    assert pythons.startswith("OutOfMemoryError model: out of memory; ")


def test_too_little_memory_on_a_gpu() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    assert isinstance(in_words(error), OutOfMemoryError)
    assert "(2.00 GiB more were asked for)" in text_of(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("x"),
        KeyError("x"),
        BrokenPipeError(32, "x"),
        socket.gaierror(-2, "Name or service not known"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
    ],
)
def test_what_may_be_a_bug_is_passed_on(error: Exception) -> None:
    assert in_words(error) is None
    with pytest.raises(type(error)) as raised, explained("x"):
        raise error
    assert raised.value is error


def chained(*errors: BaseException) -> BaseException:
    """The last of the errors, each raised while the one before was handled."""
    try:
        raise errors[0]
    except BaseException as error:
        if len(errors) == 1:
            return error
        try:
            return chained(*errors[1:])
        finally:
            errors[1].__context__ = error


@pytest.mark.parametrize(
    ("failure", "is_found"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), False),
        (OSError("We couldn't connect to the hub"), False),
        (KeyError("x"), False),
    ],
)
def test_what_failed_of_the_machine_is_found_behind_what_a_library_makes_of_it(
    failure: BaseException, is_found: bool
) -> None:
    assert machine_failure(failure) is (failure if is_found else None)
    wrapped = chained(failure, ValueError("the tokenizer cannot be used"), RuntimeError("no such model"))
    assert machine_failure(wrapped) is (failure if is_found else None)


def test_errors_that_are_in_words_already_stay_as_they_are() -> None:
    ours = OutputExistsError("out exists")
    with pytest.raises(SparseError) as raised, explained("x"):
        raise ours
    assert raised.value is ours


def test_a_function_can_be_explained() -> None:
    @explained()
    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"^No space left on device; make room"):
        write()
