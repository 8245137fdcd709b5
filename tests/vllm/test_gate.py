"""The gate as a release pipeline runs it: two models, four measurements, a verdict, an exit status, two reports."""

import json
from pathlib import Path

import pytest

from sparse_serve.cli.main import main
from tests import models
from tests.vllm.test_plugin import make_sparse


def run_gate(root: Path, dense: Path, sparse: Path, max_ppl_increase: float) -> tuple[int, dict]:
    data = root / "heldout.txt"
    data.write_text(models.TEXT[:6000], "utf-8")
    out = root / "report"
    command = ["gate", "--dense", dense, "--sparse", sparse, "--data", data, "--out", out, "--window", "48"]
    command += ["--max-windows", "24", "--max-ppl-increase", max_ppl_increase]
    code = main([str(part) for part in command])
    return code, json.loads((out / "report.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gate")
    sparse, _ = make_sparse("llama", root)
    return root / "base", sparse


def test_a_tolerant_gate_passes(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_gate(tmp_path, *pair, max_ppl_increase=100.0)
    results = {result["check"]: result for result in report["results"]}
    assert code == 0, capsys.readouterr()
    assert report["verdict"] == "pass"
    assert results["parity"]["numbers"]["sparse_relative_difference"] < 1e-3
    assert results["memory"]["numbers"]["fraction"] == pytest.approx(0.5 + 1 / 32, rel=0.06)
    assert report["provenance"]["base_matches"] is True
    assert len(report["evidence"]["sparse"]["served"]["nll_per_window"]) == 24
    assert str(pair[0].parent) not in json.dumps(report)
    assert "# Gate: PASS" in capsys.readouterr().out


def test_a_strict_gate_fails(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Random weights, half of them cut: no perplexity to be proud of."""
    code, report = run_gate(tmp_path, *pair, max_ppl_increase=-0.9)
    assert code == 1
    assert {result["check"]: result["verdict"] for result in report["results"]} == {
        "memory": "pass",
        "parity": "pass",
        "quality": "fail",
    }


def test_a_model_that_cannot_be_measured_is_exit_3(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sparse = pair
    data = tmp_path / "short.txt"
    data.write_text("too short", "utf-8")
    command = ["gate", "--dense", dense, "--sparse", sparse, "--data", data, "--out", tmp_path / "report"]
    assert main([str(part) for part in command]) == 3


def test_a_dense_model_in_the_sparse_place_is_a_usage_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, _ = pair
    command = ["gate", "--dense", dense, "--sparse", dense, "--data", tmp_path / "x", "--out", tmp_path / "report"]
    assert main([str(part) for part in command]) == 2
