"""Every result file follows the schema, but for those that are older and listed with what they lack."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import record, schema

FILES = sorted(schema.RESULTS.glob("*.json"))
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_result_is_complete_or_says_what_it_lacks(file: Path) -> None:
    assert schema.lacks(schema.read(file)) == schema.legacy().get(file.name, [])


def test_no_file_is_listed_that_is_gone_or_complete() -> None:
    assert set(schema.legacy()) <= {file.name for file in FILES}
    assert all(schema.legacy().values())


def test_what_is_superseded_is_there() -> None:
    names = {file.name for file in FILES}
    for file in FILES:
        assert set(schema.read(file).get("supersedes", ())) <= names - {file.name}, file.name


def test_figures_are_allowed_beside_it() -> None:
    assert schema.lacks(COMPLETE) == []
    assert schema.lacks({**COMPLETE, "inputs": {}, "supersedes": ["quality--demo.json"]}) == []


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
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text, "utf-8")
    with pytest.raises(ValueError):
        schema.read(tmp_path / "result.json")


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
