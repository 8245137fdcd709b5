"""The gate through running servers: text, tasks and speed of a sparse model and its dense base, from one gate.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_serve.gate import report_file
from tests import models
from tests.vllm.serving import SPARSE_LAYERS, make_checkpoint


@pytest.mark.timeout(560)
def test_two_directories_are_served_and_judged(tmp_path: Path) -> None:
    sparse = make_checkpoint(tmp_path)
    (tmp_path / "heldout.txt").write_text(models.TEXT[:3000], "utf-8")
    flags = ["--max-model-len", "128"]
    config = {
        "version": 1,
        "base": {"model": "dense", "flags": flags},
        "candidate": {"model": sparse.name, "flags": flags},
        "quality": {
            "texts": ["heldout.txt"],
            "offline": False,
            "window_tokens": 32,
            "max_ppl_increase": 100.0,
            "max_kl": 50,
        },
        "tasks": {"tasks": ["arithmetic"], "max_samples": 5},
        "speed": {"clients": [2], "requests": 2, "input_tokens": 16, "output_tokens": 8, "budget_s": 1},
    }
    (tmp_path / "gate.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "sparse_serve.cli.main", "gate", "run", "gate.yaml", "--out", "report"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False, env=environ)
    assert ran.returncode == 4, ran.stderr[-3000:]  # one round and five samples decide nothing
    report = report_file.load(tmp_path / "report/report.json")
    verdicts = {(result["check"], result["subject"]): result["verdict"] for result in report["results"]}
    assert verdicts["quality", "heldout.txt"] == verdicts["divergence", "kl, heldout.txt"] == "pass"
    assert verdicts["speed", "throughput, 2 clients"] == "inconclusive"
    (text,) = report["evidence"]["texts"]
    assert text["divergence"]["kl"] > 0
    assert text["base"]["served"]["nll_per_window"] != text["candidate"]["served"]["nll_per_window"]
    (round_,) = report["evidence"]["speed"]["rounds"]
    assert [run["target"] for run in round_["runs"]] == ["base", "candidate", "candidate", "base"]
    for run in round_["runs"]:
        assert (len(run["ttft_ms"]), len(run["e2e_ms"]), run["output_tokens"]) == (4, 4, 4 * 8)
        assert 0 < len(run["itl_ms"]) <= 4 * 7  # tokens may arrive together
    assert len(report["evidence"]["tasks"][0]["base"]) == 5
    assert "gate 3/3: speed" in ran.stderr
    kernels = {one["layer"] for one in report["evidence"]["kernels"]["candidate"]}
    assert len(kernels) == SPARSE_LAYERS
    assert all(reading["processes"] >= 2 for reading in report["evidence"]["memory"].values())
    assert report["evidence"]["memory"].keys() == {"base", "candidate"}
