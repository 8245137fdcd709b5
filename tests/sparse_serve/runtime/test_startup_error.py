"""What an engine process leaves behind reaches the one that waits for it."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from maskgen.core.errors import FormatError
from sparse_serve.runtime.startup_error import VARIABLE, leaving, listening
from sparse_serve.server.settings import Settings


@leaving()
def fail(error: type[Exception], text: str) -> None:
    raise error(text)


def test_the_error_of_another_process_is_heard() -> None:
    with listening() as heard:
        assert heard() == ""
        process = multiprocessing.get_context("spawn").Process(target=fail, args=(FormatError, "too few bits \ud800"))
        process.start()
        process.join(60)
        assert (process.exitcode, heard()) == (1, "too few bits ?")
        assert Path(os.environ[VARIABLE]).exists()
    assert VARIABLE not in os.environ


def test_only_errors_for_the_user_are_told() -> None:
    with listening() as heard:
        with pytest.raises(ZeroDivisionError):
            fail(ZeroDivisionError, "an accident")
        assert heard() == ""


def test_an_error_passes_where_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FormatError, match="bits"):
        fail(FormatError, "bits")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing" / "file"))
    with pytest.raises(FormatError, match="bits"):
        fail(FormatError, "bits")


def test_what_goes_wrong_with_listening_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = listening()
    heard = first.__enter__()
    with listening() as other:
        first.__exit__(None, None, None)
        with pytest.raises(FormatError):
            fail(FormatError, "bits")
        assert (heard(), other()) == ("", "bits")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with listening() as deaf:
        assert VARIABLE not in os.environ and deaf() == ""


def test_settings_do_not_take_it_for_one_of_theirs() -> None:
    with listening():
        Settings()
