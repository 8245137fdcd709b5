"""Commands of the manual that take vLLM and no server, run as they are shown, on a tiny model."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import maskgen
from tests import models
from tests.docs import elsewhere
from tests.vllm.nursery import command
from tests.vllm.serving import SHAPE

SMALLER = {"sparse-serve bench kernels": ["--shapes", "256x512", "--tokens", "1,4", "--seconds", "0"]}
"""What is added where a page's command would take a minute."""


def test_what_pages_show_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save("llama", tmp_path / "DENSE", **SHAPE)
    models.save_sparse(tmp_path / "DENSE", tmp_path / "SPARSE")
    quantised = maskgen.QuantiseRequest(model=tmp_path / "SPARSE", values="int8", out=tmp_path / "SPARSE-int8")
    maskgen.quantise(quantised)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shown = elsewhere.run_by("tests/vllm/test_console.py")
    assert {line.split()[1] for line in shown} == {"doctor", "tune", "bench"}
    for line in shown:
        more = next((words for start, words in SMALLER.items() if line.startswith(start)), [])
        done = command(*shlex.split(line)[1:], *more)
        # so small a layer may be slower than dense, which doctor ends with 1 for
        is_slow = "slower than dense with" in done.stdout or "could not be measured" in done.stdout
        assert done.returncode == (1 if is_slow else 0), f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "roofline.svg").is_file()
