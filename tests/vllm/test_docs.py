"""The examples of `docs/serving.md`, run as they stand there, on a tiny model and the real engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models
from tests.vllm.serving import SHAPE

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(600)
def test_what_the_manual_shows_runs(tmp_path: Path) -> None:
    """One script of all blocks, so that vLLM is imported once; the gate starts an engine for each model."""
    models.save("llama", tmp_path / "DENSE", **SHAPE)
    models.save_sparse(tmp_path / "DENSE", tmp_path / "SPARSE")
    (tmp_path / "heldout.txt").write_text(models.TEXT, "utf-8")
    blocks = BLOCK.findall(DOCS.read_text("utf-8"))
    (tmp_path / "blocks.py").write_text("\n".join(blocks), "utf-8")
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # what a reader has not set: vLLM starts processes
    done = subprocess.run(
        [sys.executable, "blocks.py"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "generated 16 tokens: " in done.stdout
    report = json.loads((tmp_path / "gate-report" / "report.json").read_text("utf-8"))
    assert f"verdict {report['verdict']}\n" in done.stdout
    assert {result["check"] for result in report["results"]} == {"kernels", "memory", "parity", "quality"}
    assert "4 of 4 candidate served (vLLM)" in done.stdout
    assert f"over {len(report['evidence']['texts'][0]['candidate']['served']['nll_per_window'])} windows" in done.stdout
    assert re.search(r"layers hold \d+ bytes, dense \d+", done.stdout)
    assert done.stdout.count(" times as fast as dense\n") == 7, "one line for each number of tokens that is measured"
    assert re.search(r"timed cpu with 16 tokens: \d", done.stdout)
