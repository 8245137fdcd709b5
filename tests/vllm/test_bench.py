"""`sparse-serve bench` from flags to table and JSON, on a small layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparse_serve import cli

READ = "read of cpu's bytes"


def run(*flags: str) -> int:
    return cli.main(["bench", "--shapes", "64x128", "--seconds", "0", "--threads", "1", *flags])


def test_every_contender_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert run("--tokens", "1,3", "--with-reference", "--json", str(tmp_path / "bench.json")) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [(result["out_features"], result["in_features"], result["tokens"]) for result in report["results"]] == [
        (64, 128, 1),
        (64, 128, 3),
    ]
    one, three = report["results"]
    kernels = {"cpu", "cpu int8", "reference", "reference int8"}
    assert set(one["speedup"]) == kernels and set(one["median_s"]) == kernels | {
        "dense torch",
        "dense vllm",
        READ,
    }
    assert set(three["median_s"]) == set(one["median_s"]) - {READ}
    assert all(value > 0 for value in (*one["median_s"].values(), *one["speedup"].values()))
    assert "64x128" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "value"), [("--shapes", "64"), ("--shapes", "64x0"), ("--tokens", "1,two")])
def test_what_is_not_a_number_is_said(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", flag, value]) == 2
    assert f"{flag} {value!r}: expected whole numbers above 0" in capsys.readouterr().err
