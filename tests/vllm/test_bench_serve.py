"""`sparse-serve bench serve` from flags to tables and JSON, on a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.serving import make_checkpoint


@pytest.mark.timeout(420)
def test_a_sparse_model_is_served_against_its_dense_base(tmp_path: Path) -> None:
    sparse = make_checkpoint(tmp_path)
    flags = ["--dense", str(tmp_path / "dense"), "--sparse", str(sparse), "--json", str(tmp_path / "bench.json")]
    flags += ["--rounds", "1", "--clients", "2", "--requests", "2", "--input-tokens", "16", "--output-tokens", "64"]
    command = [sys.executable, "-m", "sparse_serve.cli.main", "bench", "serve", *flags, "--", "--max-model-len", "128"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environ)
    assert ran.returncode == 0, ran.stderr
    assert all(title in ran.stdout for title in ("decode, tokens/s", "first token, ms", "dense", "sparse"))
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["vllm_flags"] == ["--max-model-len", "128"]
    assert [(run["model"], run["clients"]) for run in written["runs"]] == [("dense", 2), ("sparse", 2)]
    for measured in written["runs"]:
        assert (measured["vllm"]["completed"], measured["vllm"]["total_output_tokens"]) == (4, 4 * 64)
        assert all(value > 0 for value in measured["figures"].values())
    assert [row["ratios"] for row in written["results"]] == [[row["ratio"]] for row in written["results"]]
    assert str(tmp_path) not in json.dumps(written)
