"""docs/python.md: its blocks are run as they stand, in order; only the demo is a tiny model instead of a reader's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import maskgen
from maskgen.data import demo
from tests import models
from tests.architecture.source import ROOT

PAGE = ROOT / "docs" / "python.md"
TEXT = PAGE.read_text("utf-8")


def blocks() -> list[str]:
    """The code of the page, each block at the line where it stands, so that a traceback points there."""
    found = re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return ["\n" * TEXT.count("\n", 0, block.start(1)) + block[1] for block in found]


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def build(out: Path | None, tell: Callable[[str], None]) -> Path:
        folder = tmp_path / "cache" / "demo"
        models.save("llama", folder / "model", dtype=torch.bfloat16, max_position_embeddings=256)
        (folder / "calibration.txt").write_text(models.TEXT[:20_000])
        (folder / "heldout").mkdir()
        (folder / "heldout" / "news.txt").write_text(models.TEXT[20_000:])
        return folder

    monkeypatch.setattr(demo, "build", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    assert len(blocks()) == TEXT.count("```python")
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert f"{7 * models.LAYERS} layers, 56.25% of their bytes" in said
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
