"""Every record follows the schema, but for those that are older and listed with what they lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench import record, schema, superseded

COMPLETE: dict[str, Any] = {
    "created": "2026-11-27T08:00:00+00:00",
    "commit": "a" * 40,
    "command": "sparse-serve bench kernels --json k.json",
    "versions": {"torch": "2.13.0+cpu"},
    "machine": "x86_64",
    "processor": "AMD EPYC",
    "cpus": 2,
    "inputs": {"model": "sha256:" + "b" * 64},
    "results": [{"speedup": 1.5}],
}


CURRENT, SUPERSEDED = schema.current(), schema.superseded()
EVERY = CURRENT | {name: old.record for name, old in SUPERSEDED.items()}


@pytest.mark.parametrize("name", EVERY)
def test_a_record_is_complete_or_says_what_it_lacks(name: str) -> None:
    known = [what for what in schema.legacy().get(name, []) if what != schema.NOT_IN_HISTORY]
    assert schema.lacks(EVERY[name]) == known


def test_nothing_but_records_lies_there() -> None:
    assert {file.suffix for file in schema.RESULTS.iterdir()} <= {".json", ".jsonl"}


def test_no_record_is_listed_that_is_gone_or_complete() -> None:
    assert set(schema.legacy()) <= set(EVERY)
    assert all(schema.legacy().values())


def test_commits_are_in_the_history() -> None:
    """So that what was measured can be checked out: no commit of a branch that was rewritten since."""
    history = schema.history()
    if history is None:
        pytest.skip("a shallow clone, or no git: there is no history to look commits up in")
    unknown = {
        name for name, value in EVERY.items() if "commit" not in schema.lacks(value) and value["commit"] not in history
    }
    assert unknown == {name for name, lacking in schema.legacy().items() if schema.NOT_IN_HISTORY in lacking}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A repository of two commits."""
    git(tmp_path, "init", "whole")
    for message in ("one", "two"):
        git(tmp_path / "whole", "commit", "--allow-empty", "--message", message)
    return tmp_path / "whole"


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def test_a_shallow_clone_has_no_history(whole: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--depth", "1", f"file://{whole}", "part")
    assert len(schema.history(whole) or ()) == 2
    assert schema.history(tmp_path / "part") is None


def test_a_repository_around_a_copy_is_not_its_history(whole: Path, tmp_path: Path) -> None:
    (whole / "vendor/sparse-serve").mkdir(parents=True)
    assert schema.history(whole / "vendor/sparse-serve") is None
    git(tmp_path, "init", "none")
    assert schema.history(tmp_path / "none") is None, "no commit yet"
    (tmp_path / "link").symlink_to(whole)
    assert len(schema.history(tmp_path / "link") or ()) == 2


def test_what_has_been_superseded_is_a_line() -> None:
    """And no file; what took its place is there, as a file or as a line in its turn."""
    for name, value in CURRENT.items():
        for old in value.get("supersedes", ()):
            assert name in SUPERSEDED[old].by, f"python -m tests.bench.superseded {old} --by {name}"
    for name, old in SUPERSEDED.items():
        assert old.by and set(old.by) <= set(EVERY) - {name}, name


def test_figures_are_allowed_beside_it() -> None:
    assert schema.lacks(COMPLETE) == []
    assert (
        schema.lacks({**COMPLETE, "inputs": {}, "supersedes": ["quality--demo--x86_64-2core--20261126-124136"]}) == []
    )


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("commit", "a" * 40 + "-dirty"),
        ("commit", None),
        ("commit", "2f5c746"),
        ("command", ""),
        ("created", "2026-11-27T08:00:00"),
        ("inputs", {"model": "SmolLM2"}),
        ("cpus", 0),
        ("versions", {"torch": ""}),
    ],
)
def test_what_is_wrong_is_found(key: str, wrong: object) -> None:
    assert schema.lacks({**COMPLETE, key: wrong}) == [key]
    assert key in schema.lacks({name: value for name, value in COMPLETE.items() if name != key})


@pytest.mark.parametrize("text", ["[]", '{"a": NaN}', '{"a": 1, "a": 2}', "{"])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        schema.parse(text, "result.json")
    (tmp_path / "a--b--c--20261127-080000.json").write_text(text, "utf-8")
    with pytest.raises(ValueError):
        schema.current(tmp_path)
    with pytest.raises(ValueError):
        superseded.move(["a--b--c--20261127-080000"], ["a--b--c--20261127-090000"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a--b--c--20261127-080000.json"]


def test_a_line_of_another_subject_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a--b--c.jsonl").write_text('{"name": "a--b--d--1", "superseded_by": ["x"], "record": {}}\n', "utf-8")
    with pytest.raises(ValueError, match="expected name, superseded_by and record of a--b--c"):
        schema.superseded(tmp_path)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(), st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
    ),
    st.booleans(),
)
def test_a_line_has_what_the_file_had_numbers_as_they_are_spelt(value: dict[str, Any], is_ascii: bool) -> None:
    def spelt(text: str) -> object:
        return json.loads(text, parse_float=str, parse_int=str)

    text = json.dumps(value, indent=1, ensure_ascii=is_ascii)
    line = superseded.compact(text)
    assert spelt(line) == spelt(text)
    assert "\n" not in line


def test_a_record_takes_the_place_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def save(**figures: object) -> str:
        return record.save("quality", "demo", figures, ["row", "windows"]).stem

    first, other = save(row="admm", windows=64, ppl=2.50), save(row="admm", windows=8)
    second = save(row="admm", windows=64, ppl=2.25)
    found = schema.current(tmp_path)
    assert set(found) == {other, second}
    assert found[second]["supersedes"] == [first]
    assert "supersedes" not in found[other]
    (old,) = schema.superseded(tmp_path).items()
    assert (old[0], old[1].by, old[1].record["ppl"]) == (first, (second,), 2.5)


def test_what_is_saved_follows_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "commit", lambda: "c" * 40)
    monkeypatch.setattr(sys, "argv", ["/opt/bin/bench", "--model", "/home/me/demo", "--json=/tmp/out.json", "a=1"])
    digest = "sha256:" + "d" * 64
    path = record.save("quality", "demo", {"model_digest": digest, "eval_digest": digest, "rows": []})
    found = json.loads(path.read_text("utf-8"))
    assert schema.lacks(found) == []
    assert found["inputs"] == {"model": digest, "eval": digest}
    assert found["command"].endswith(" --model demo --json=out.json a=1")
