"""`sparse-serve bench` from flags to table and JSON, on a small layer. In a process of its own: it imports vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

READ = "read of cpu's bytes"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparse_serve.cli", "bench", "--seconds", "0", "--threads", "1", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_contender_is_measured(tmp_path: Path) -> None:
    ran = run("--shapes", "64x128", "--tokens", "1,3", "--with-reference", "--json", str(tmp_path / "bench.json"))
    assert ran.returncode == 0, ran.stderr
    assert "64x128" in ran.stdout
    one, three = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [(row["out_features"], row["in_features"], row["tokens"]) for row in (one, three)] == [
        (64, 128, 1),
        (64, 128, 3),
    ]
    kernels = {"cpu", "cpu int8", "reference", "reference int8", "reference fp8_e4m3"} & set(one["speedup"])
    assert {"cpu", "cpu int8", "reference"} <= kernels == set(one["speedup"])
    assert set(one["median_s"]) == kernels | {"dense torch", "dense vllm", READ}
    assert set(three["median_s"]) == set(one["median_s"]) - {READ}
    assert all(value > 0 for value in (*one["median_s"].values(), *one["speedup"].values()))


def test_what_is_not_a_number_is_said() -> None:
    ran = run("--shapes", "64x0")
    assert ran.returncode == 2
    assert "--shapes '64x0': expected whole numbers above 0" in ran.stderr
