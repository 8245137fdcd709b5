"""`sparse-serve bench` from flags to tables and JSON, on a small layer and a small model.

In a process of its own: it imports vLLM, which changes the environment of the servers that other tests start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.serving import make_checkpoint

READ = "read of cpu's bytes"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparse_serve.cli.main", "bench", *flags]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environ)


def test_every_contender_is_measured(tmp_path: Path) -> None:
    flags = ["--shapes", "64x128", "--tokens", "1,3", "--with-reference", "--seconds", "0", "--threads", "1"]
    ran = run("kernels", *flags, "--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.svg"))
    assert ran.returncode == 0, ran.stderr
    assert "64 x 128" in ran.stdout and "of byte" in ran.stdout
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {"created", "commit", "versions", "processor", "threads", "isa", "dtype"} <= set(written)
    one, three = written["results"]
    shapes = [(row["out_features"], row["in_features"], row["tokens"]) for row in (one, three)]
    assert shapes == [(64, 128, 1), (64, 128, 3)]
    kernels = {"cpu", "cpu int8", "reference", "reference int8", "reference fp8_e4m3"} & set(one["speedup"])
    assert {"cpu", "cpu int8", "reference"} <= kernels == set(one["speedup"])
    dense = {"dense torch", "dense vllm"}
    assert set(one["median_s"]) == kernels | dense | {READ} == set(one["weight_bytes"])
    assert set(three["median_s"]) == kernels | dense == set(one["of_byte_limit"])
    assert three["of_byte_limit"] == {}
    for row in (one, three):
        assert {name: set(ratios) for name, ratios in row["speedup_over"].items()} == dict.fromkeys(dense, kernels)
        assert all(value > 0 for value in (*row["median_s"].values(), *row["speedup"].values()))
    assert one["weight_bytes"]["dense torch"] == 64 * 128 * 2
    assert ">cpu int8</text>" in (tmp_path / "bench.svg").read_text()


def test_that_there_is_nothing_to_plot_to_is_said_at_once() -> None:
    ran = run("kernels", "--plot", "roofline.jpg")
    assert ran.returncode == 2
    assert "--plot roofline.jpg: expected a name that ends in one of .svg, .png, .pdf" in ran.stderr


@pytest.mark.timeout(420)
def test_a_sparse_model_is_served_against_its_dense_base(tmp_path: Path) -> None:
    sparse = make_checkpoint(tmp_path)
    flags = ["--dense", str(tmp_path / "dense"), "--sparse", str(sparse), "--json", str(tmp_path / "bench.json")]
    flags += ["--rounds", "1", "--clients", "2", "--requests", "2", "--input-tokens", "16", "--output-tokens", "64"]
    ran = run("serve", *flags, "--", "--max-model-len", "128")
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
