"""Why an engine process could not start reaches the server that waits for it."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import pytest

from maskgen.core.errors import FormatError
from sparse_serve.runtime import environment
from sparse_serve.runtime.startup_error import collect_startup_error, record_startup_error
from sparse_serve.server.settings import Settings


@record_startup_error()
def fail(error: type[Exception], text: str) -> None:
    raise error(text)


def test_the_error_of_another_process_is_recorded() -> None:
    with collect_startup_error() as recorded:
        assert recorded() == ""
        process = multiprocessing.get_context("spawn").Process(target=fail, args=(FormatError, "too few bits \ud800"))
        process.start()
        process.join(60)
        assert (process.exitcode, recorded()) == (1, "too few bits ?")
        assert (path := environment.startup_error_file()) is not None and path.exists()
    assert environment.startup_error_file() is None


def test_only_errors_for_the_user_are_recorded() -> None:
    with collect_startup_error() as recorded:
        with pytest.raises(ZeroDivisionError):
            fail(ZeroDivisionError, "an accident")
        assert recorded() == ""


def test_an_error_passes_where_nobody_collects_it(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "file", None):
        environment.set_startup_error_file(path)
        with pytest.raises(FormatError, match="bits"):
            fail(FormatError, "bits")


def test_what_goes_wrong_with_collecting_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = collect_startup_error()
    recorded = first.__enter__()
    with collect_startup_error() as other:
        first.__exit__(None, None, None)
        with pytest.raises(FormatError):
            fail(FormatError, "bits")
        assert (recorded(), other()) == ("", "bits")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with collect_startup_error() as without_a_place:
        assert environment.startup_error_file() is None and without_a_place() == ""


def test_settings_do_not_take_it_for_one_of_theirs() -> None:
    with collect_startup_error():
        Settings()
