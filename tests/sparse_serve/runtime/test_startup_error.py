"""Why an engine process could not start reaches the server that waits for it."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
from pathlib import Path

import pydantic
import pytest

from maskgen.core.errors import FormatError
from sparse_serve.runtime import environment
from sparse_serve.runtime.startup_error import (
    collect_startup_error,
    reason,
    record_failed_processes,
    record_startup_error,
)
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


def log_failure(logger: str, error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger(logger).exception("it failed")


def test_what_vllm_logs_when_a_process_fails_is_recorded_and_the_first_error_stays() -> None:
    """A worker fails first, and then the engine process that waits for it, with words that explain nothing."""
    log_failure("vllm.v1.engine.core", RuntimeError("nobody listens"))
    with collect_startup_error() as recorded:
        record_failed_processes()
        logging.getLogger("vllm.v1.engine.core").error("no exception")
        log_failure("vllm.v1.worker", RuntimeError("not of a process's end"))
        assert recorded() == ""
        log_failure(
            "vllm.v1.executor.multiproc_executor", ValueError("No available memory for the cache blocks.\nMore")
        )
        log_failure("vllm.v1.engine.core", Exception("WorkerProc initialization failed. See stack trace"))
        assert recorded() == "No available memory for the cache blocks."


class Config(pydantic.BaseModel):
    level: int = 0
    name: str = "a"

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Config:
        if self.level > 3:
            raise ValueError("level (4) is greater\nthan 3. To allow it, set LEVEL=1. ")
        assert self.name != "b", "no b"
        return self


def failure(**values: object) -> pydantic.ValidationError:
    with pytest.raises(pydantic.ValidationError) as caught:
        Config(**values)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (failure(level=4), "level (4) is greater than 3."),
        (failure(name="b"), "no b"),
        (failure(level="x", name=3), "level is 'x': Input should be a valid integer"),
    ],
)
def test_pydantics_errors_end_with_the_reason_as_objects_and_as_text(
    error: pydantic.ValidationError, expected: str
) -> None:
    text = str(error)
    assert "errors.pydantic.dev" in text.splitlines()[-1]
    assert reason(error).startswith(expected)
    for copy in (RuntimeError(text), text, f"argument --config: {text}"):
        said = reason(copy)
        assert expected.replace(" is 'x'", "") in said and "pydantic" not in said and "input_value" not in said


IN_A_PROCESS = """Error raised in subprocess:
<frozen runpy>:128: RuntimeWarning: 'x' found in sys.modules
Traceback (most recent call last):
  File "registry.py", line 3, in <module>
    raise ImportError(
ImportError: libfoo.so.1: cannot open shared object file
[W1 12:00:00 socket.cpp] a warning on the way out
"""
TOKENIZER = """Couldn't instantiate the backend tokenizer from one of:
(1) a `tokenizers` library serialization file,
(2) a slow tokenizer instance to convert.
You need to have sentencepiece installed."""
CORE = "Engine core initialization failed. See root cause above. Failed core proc(s): "


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("  one line  \n"), "one line"),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous\n"),
            "CUDA error: out of me",
        ),
        (RuntimeError("the field 'n':\n    TypeError: expected int"), "the field 'n': TypeError: expected int"),
        (RuntimeError(IN_A_PROCESS), "ImportError: libfoo.so.1: cannot open shared object file"),
        (ValueError(TOKENIZER), "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library"),
        (TypeError("Error: --a requires --b"), "--a requires --b"),
        (RuntimeError(CORE + "{'EngineCore': -9}"), "vLLM's engine process was killed by SIGKILL, probably as memory"),
        (RuntimeError(CORE + "{'EngineCore': -4}"), "vLLM's engine process was killed by SIGILL"),
        (RuntimeError(CORE + "{'EngineCore': -99}"), "vLLM's engine process was killed by signal 99"),
        (RuntimeError(CORE + "{'EngineCore': 1}"), "vLLM's engine process ended with exit status 1 and did not say"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "[Errno 2] No such file or directory: 'a.json'"),
        (FormatError("bits"), "bits"),
        (KeyError("rope_theta"), "KeyError: 'rope_theta'"),
        (ValueError(""), "ValueError"),
    ],
)
def test_of_other_errors_the_reason_is_the_line_that_says_it(error: Exception, expected: str) -> None:
    assert reason(error).startswith(expected)
    assert "\n" not in reason(error)


def test_an_error_without_words_says_where_it_was_raised() -> None:
    with pytest.raises(AssertionError) as caught:
        exec(compile("assert 1 == 2", "loader.py", "exec"), {})
    assert reason(caught.value).startswith("AssertionError in loader.py, line 1")


def test_a_long_list_is_cut() -> None:
    said = reason(ValueError(f"not supported: {['ForCausalLM'] * 300}"))
    assert said.startswith("not supported") and said.endswith("...") and len(said) == 500


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
