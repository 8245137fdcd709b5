"""Reading logs: what a run was, and one clear line for every way in which a log is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.errors import FormatError
from maskgen.train.report.runs import find, load, place
from tests.maskgen import logs


def test_a_finished_run(tmp_path: Path) -> None:
    run = load(logs.write(tmp_path / "log"))
    assert (run.finished, run.steps_done, run.tokens, run.peak_memory_bytes) == (True, 4, 256, 12_000_000)
    assert (run.dense_perplexity, [look.perplexity for look in run.evals]) == (50.0, [60.0, 58.0, 55.0])
    assert run.elapsed_s == 9.5, "the last evaluation counts"
    assert set(run.layers) == set(logs.LAYERS) and run.name == str(tmp_path / "log")


def test_speed_leaves_evaluations_out(tmp_path: Path) -> None:
    """Steps end at 3, 5, 7, 9 s; the looks before steps 1 and 3 end at 1.5 and 5.5 s."""
    assert list(load(logs.write(tmp_path / "log")).tokens_per_s()) == [(1, 64 / 1.5), (2, 32), (3, 64 / 1.5), (4, 32)]
    assert list(load(logs.write(tmp_path / "log", [logs.step(1), logs.step(2)])).tokens_per_s()) == [(2, 32)]


@pytest.mark.parametrize("records", [[], [logs.step(1)], [logs.look(0, 9.0)], [logs.step(1), {"kind": "new", "x": 1}]])
def test_a_run_that_has_just_begun(records: list[dict[str, Any]], tmp_path: Path) -> None:
    run = load(logs.write(tmp_path / "log", records))
    assert not run.finished and run.layers == {} and run.dense_perplexity is None
    assert run.steps_done == len(run.steps) and run.elapsed_s == (3.0 if run.steps else 1.5 if run.evals else 0.0)


def test_the_line_that_is_being_written_counts_as_absent(tmp_path: Path) -> None:
    path = logs.write(tmp_path / "log", [logs.step(1)])
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "step": 2, "na\xc3')
    assert load(path).steps_done == 1


def test_line_ends_of_other_scripts_end_no_line(tmp_path: Path) -> None:
    name = "a\u2028b\x85c\x1ed\r\n"
    assert load(logs.write(tmp_path / "log", model=name)).header.model == name


def test_where_a_log_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = tmp_path / "out.work"
    work.mkdir()
    running = logs.write(work / "log.jsonl")
    assert find(out) == find(work) == find(running) == running
    out.mkdir()
    finished = logs.write(out / "maskgen_log.jsonl")
    assert find(out) == finished and find(work) == running
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="empty: holds no log; expected what `maskgen run` with a learned method"):
        find(tmp_path / "empty")
    with pytest.raises(FormatError, match="nothing: no such run"):
        find(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (logs.step(1, loss="0.1"), "'step' of step 1: 'loss': input should be a valid number, got '0.1'"),
        (logs.step(1, loss=True), "'loss'"),
        (logs.step(1, loss=float("nan")), "'loss': input should be a finite number"),
        (logs.step(1, tokens=-1), "'tokens'"),
        (logs.step(1, tokens=10**30), "'tokens'"),
        (logs.step(1, tokens=10**400), "'tokens'"),
        (logs.step(1, step="<1>"), "of step '<1>': 'step'"),
        ({"kind": "step", "step": 1}, "'loss': field required"),
        (logs.look(0, 0.0), "'perplexity'"),
        (logs.look(0, 9.0, agreement=1.01), "'agreement'"),
        (logs.layers({"a": {"agreement": 1.0, "patterns": {"1200": 1}}}), "patterns"),
        (logs.layers({"a": {"agreement": 1.0, "patterns": {"1100": -1}}}), "patterns.1100"),
        (logs.layers({"a": {"agreement": 1.0, "patterns": {"10": 1, "1100": 1}}}), "patterns of different lengths"),
        (logs.layers({"a": []}), "'layers.a'"),
        ([1], "a line holds no object"),
    ],
)
def test_damaged_lines(record: Any, message: str, tmp_path: Path) -> None:
    path = logs.write_raw(tmp_path / "log", {"kind": "header", **logs.header()}, record)
    with pytest.raises(FormatError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize("change", [{"recipe": {}}, {"digests": {"data": 1}}, {"steps": 1.5}, {"heldout_windows": "6"}])
def test_damaged_headers(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="in the line of kind 'header'"):
        load(logs.write(tmp_path / "log", **change))


@pytest.mark.parametrize("text", ["", "\n", "{}\n", '{"kind": "step"}\n', "\x00\xff\n", "[" * 100_000 + "\n"])
def test_what_is_no_log(text: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(text, "latin-1")
    with pytest.raises(FormatError, match="not a log of maskgen"):
        load(path)


def test_steps_out_of_order(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="lines of kind 'step' are not in the order of their steps"):
        load(logs.write(tmp_path / "log", [logs.step(2), logs.step(1)]))


def test_extra_fields_are_passed_over(tmp_path: Path) -> None:
    run = load(logs.write(tmp_path / "log", [logs.step(1, new=[1])], processes=2))
    assert run.steps_done == 1 and run.facts["processes"] == 2
    assert json.loads((tmp_path / "log").read_text().splitlines()[0])["processes"] == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers.*.mlp.up_proj", 3)),
        ("h.11.attn", ("h.*.attn", 11)),
        ("layers.0.experts.7.w1", ("layers.*.experts.7.w1", 0)),
        ("0", ("*", 0)),
        ("fc1.fc2", ("fc1.fc2", None)),
        ("layers.1234567.x", ("layers.1234567.x", None)),
        ("layers.²", ("layers.²", None)),
    ],
)
def test_places(name: str, expected: tuple[str, int | None]) -> None:
    assert place(name) == expected
