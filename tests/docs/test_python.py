"""docs/python.md: its blocks are run as they stand, in order; only the demo model is smaller than a reader's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import maskgen
from maskgen.train import demo
from tests.architecture.source import ROOT
from tests.maskgen.train.test_demo import DOCUMENTS, TINY

PAGE = ROOT / "docs" / "python.md"
TEXT = PAGE.read_text("utf-8")


def blocks() -> list[str]:
    """The code of the page, each block at the line where it stands, so that a traceback points there."""
    found = re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return ["\n" * TEXT.count("\n", 0, block.start(1)) + block[1] for block in found]


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build, small = demo.build, replace(TINY, max_tokens=256)
    monkeypatch.setattr(demo, "build", lambda out, progress: build(out, progress, small, DOCUMENTS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    assert len(blocks()) == TEXT.count("```python")
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "7 layers, 56.25% of their bytes" in said
    assert re.search(r"perplexity \d+\.\d+ dense, \d+\.\d+ sparse\nwindow 256, non-overlapping", said)
    assert [int(step) for step in re.findall(r"^step (\d+): held-out perplexity", said, re.MULTILINE)] == [0, 10, 20]
    assert "RequestError PruneRequest: no field 'sampels'" in said
    assert "DataError method wanda needs calibration text; give it with `data`" in said
    assert "OutputExistsError sparse exists; remove it or choose another output" in said
    made = {"sparse", "learned", "report.html", "reordered", "compressed", "sparse-int8", "masked-dense", "cache"}
    assert {path.name for path in tmp_path.iterdir()} == made


def test_the_page_lists_every_function_with_its_request() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `?(\w*)`? *\|", TEXT, re.MULTILINE))
    functions = {name for name in maskgen.__all__ if name[0].islower()}
    assert set(rows) == functions
    assert {request for request in rows.values() if request} == {
        name for name in maskgen.__all__ if name.endswith("Request")
    }
