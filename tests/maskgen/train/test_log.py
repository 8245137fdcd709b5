"""The log: appended line by line, cut at a step, and read whatever a killed process left at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskgen.core.errors import FormatError
from maskgen.train.log import TrainLog, read
from tests.maskgen.training import largest_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of three steps."""
    with TrainLog(tmp_path / "log.jsonl", {"recipe": "x"}, 0) as log:
        for step in (1, 2, 3):
            log.add("step", {"step": step, "loss": step / 3, "absent": None})
        log.flush()
    return tmp_path / "log.jsonl"


def test_one_object_per_line(path: Path) -> None:
    assert path.read_text().count("\n") == 4
    assert read(path)[0] == {"kind": "header", "recipe": "x"}
    assert read(path)[3] == {"kind": "step", "step": 3, "loss": 1.0}


def test_lines_after_the_step_are_cut_and_the_first_header_stays(path: Path) -> None:
    with TrainLog(path, {"recipe": "y"}, 2) as log:
        log.add("step", {"step": 3})
    assert [record.get("step") for record in read(path)] == [None, 1, 2, 3]
    assert read(path)[0]["recipe"] == "x" and "loss" not in read(path)[3]


def test_a_run_from_the_start_begins_a_new_log(path: Path) -> None:
    TrainLog(path, {"recipe": "y"}, 0).__exit__(None, None, None)
    assert read(path) == [{"kind": "header", "recipe": "y"}]


def test_a_log_that_is_gone_is_begun_again(tmp_path: Path) -> None:
    TrainLog(tmp_path / "log.jsonl", {"recipe": "y"}, 2).__exit__(None, None, None)
    assert read(tmp_path / "log.jsonl") == [{"kind": "header", "recipe": "y"}]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_at_the_end_counts_as_absent(cut: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record.get("step") for record in read(path)] == [None, 1, 2]
    with TrainLog(path, {}, 2) as log:
        log.add("step", {"step": 3})
    assert [record.get("step") for record in read(path)] == [None, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "{}\n", "no\n", "[1]\n", '{"kind": "step"}\n', '{"kind": "header"}\nno\n'])
def test_what_is_no_log(text: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"log\.jsonl: not a log of maskgen: "):
        read(path)


def test_numbers_that_json_cannot_hold_are_refused(path: Path) -> None:
    with TrainLog(path, {}, 3) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.add("step", {"loss": float("nan")})


def test_a_full_disk_is_told_by_the_line_that_did_not_fit(path: Path) -> None:
    """Closing the file tries once more, and must not put its own error in the place of this one."""
    kept = "the checkpoint of step 3 is kept"
    with (
        largest_file(path.stat().st_size + 10),
        pytest.raises(OSError, match=rf"log\.jsonl: .*too large; .*; {kept}"),
        TrainLog(path, {}, 3) as log,
    ):
        try:
            log.add("step", {"step": 4, "loss": 1.0})
        except OSError as error:
            raise OSError(f"{error}; {kept}") from error
    assert [record.get("step") for record in read(path)] == [None, 1, 2, 3]


def test_what_is_lost_in_closing_is_an_error(path: Path) -> None:
    log = TrainLog(path, {}, 3)
    log._file.write("not flushed")
    with largest_file(path.stat().st_size), pytest.raises(OSError, match="too large"):
        log.__exit__(None, None, None)
