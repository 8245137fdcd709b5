"""`self` is a file that is written once, whole, for each model and number of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import maskgen
from maskgen.core.errors import DataError, RequestError
from maskgen.data import own
from maskgen.hf import generate
from tests.conftest import ModelDir


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(generate, "DOCUMENT_TOKENS", 40)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_means_it() -> None:
    assert own.is_own("self") and own.is_own(Path("self:12"))
    assert not own.is_own("self.txt") and not own.is_own("./self")


@pytest.mark.parametrize("source", ["self:", "self:0", "self:-1", "self:many", "self:1.5"])
def test_numbers_that_are_none_are_refused(source: str, model_dir: ModelDir) -> None:
    with pytest.raises(DataError, match=f"{source}: expected self, or self:NUMBER"):
        own.written(source, model_dir(), "cpu", print)


def test_it_is_written_once(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    path = own.written("self:2", model_dir(), "cpu", told.append)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= 2 and all(row["text"] for row in rows)
    assert told[0] == "writing 2 texts with the dense model"
    monkeypatch.setattr(own, "_write", lambda *args: pytest.fail("written again"))
    assert own.written("self:2", model_dir(), "cpu", told.append) == path
    with pytest.raises(pytest.fail.Exception):
        own.written("self:3", model_dir(), "cpu", told.append)


def test_an_interrupted_file_is_not_taken(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: generate.Writer, *args: object) -> Iterator[generate.Row]:
        yield {"text": "one"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate.Writer, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            own.written("self:2", model_dir(), "cpu", print)
    assert "one" not in own.written("self:2", model_dir(), "cpu", print).read_text()


def test_a_model_is_calibrated_on_what_it_wrote(model_dir: ModelDir, tmp_path: Path) -> None:
    overrides = {"calibration.samples": 4, "calibration.window_tokens": 16}
    request = maskgen.PruneRequest(
        recipe="wanda", model=model_dir(), data="self:8", out=tmp_path / "out", overrides=overrides
    )
    pruned = maskgen.prune(request)
    assert isinstance(pruned, maskgen.PruneResult) and pruned.out.is_dir()
    with pytest.raises(RequestError, match="`data` self: what a model wrote itself says nothing"):
        maskgen.evaluate(maskgen.EvaluateRequest(model=model_dir(), data="self", window_tokens=16))
