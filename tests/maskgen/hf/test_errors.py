"""What transformers raises becomes one line; what fails of the machine stays what it is, however it was wrapped."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from maskgen.core.errors import ModelError, OutOfMemoryError, StorageError
from maskgen.core.failures import explained
from maskgen.hf.errors import clear_errors, first_line


def wrapped(inner: BaseException, outer: Exception) -> None:
    """`outer` in place of `inner`, as a library does that tells in its own words what it cannot read."""
    try:
        raise inner
    except BaseException:
        raise outer from None


@pytest.mark.parametrize(
    "outer", [OSError("Unable to load vocabulary"), ValueError("no such tokenizer"), Exception("?")]
)
def test_a_failure_of_the_machine_is_told_in_its_own_words(outer: Exception) -> None:
    disk = OSError(errno.EIO, os.strerror(errno.EIO), "/models/tokenizer.json")
    message = r"/models/tokenizer\.json: Input/output error"
    with pytest.raises(StorageError, match=message), explained(), clear_errors(Path("/models")):
        wrapped(disk, outer)
    with pytest.raises(OutOfMemoryError), explained(), clear_errors(Path("/models")):
        wrapped(MemoryError(), outer)


def test_a_file_that_a_library_looked_for_is_no_failure() -> None:
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/models/added_tokens.json")
    message, advice = "/models: no usable tokenizer: unknown type; try another", "; try another"
    with pytest.raises(ModelError) as caught, clear_errors(Path("/models"), "no usable tokenizer", advice):
        wrapped(missing, ValueError("unknown type\nand much more"))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("Validation error for field 'hidden_size':\n    TypeError: expected int, got '64'\nmore"),
         "Validation error for field 'hidden_size': TypeError: expected int, got '64'"),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (ZeroDivisionError("integer modulo by zero"), "ZeroDivisionError: integer modulo by zero"),
        (ValueError("\n"), "ValueError"),
    ],
)  # fmt: skip
def test_the_line_of_an_error_that_says_what_was_wrong(error: Exception, told: str) -> None:
    assert first_line(error) == told


def test_a_bug_is_not_explained() -> None:
    class Bug(Exception):
        pass

    with pytest.raises(Bug), clear_errors(Path("/models")):
        raise Bug
