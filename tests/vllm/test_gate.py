"""The gate as a release pipeline runs it: two models, four measurements, a verdict, an exit status, two reports."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparse_serve.cli.main import main
from sparse_serve.gate import runner
from tests import models
from tests.vllm.offline import make_sparse


def run_gate(root: Path, dense: Path, sparse: Path, max_ppl_increase: float) -> tuple[int, dict]:
    data = root / "heldout.txt"
    data.write_text(models.TEXT[:6000], "utf-8")
    out = root / "report"
    command = ["gate", "--dense", dense, "--sparse", sparse, "--data", data, "--out", out, "--window", "48"]
    command += ["--max-windows", "24", "--max-ppl-increase", max_ppl_increase]
    code = main([str(part) for part in command])
    return code, json.loads((out / "report.json").read_text("utf-8"))


def set_by_a_start(environ: dict[str, str]) -> dict[str, str]:
    names = ("_SPARSE_SERVE", "VLLM_", "TORCHDYNAMO_")
    return {name: value for name, value in environ.items() if name.startswith(names)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Dense and sparse, of the kind whose tokenizer puts BOS in front by itself."""
    sparse, _ = make_sparse("llama", tmp_path)
    for directory in (tmp_path / "base", sparse):
        models.bos_tokenizer().save_pretrained(directory)
    return tmp_path / "base", sparse


def test_one_measurement_is_judged_by_two_limits(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights, half of them cut: no perplexity to be proud of."""
    offline, served = functools.cache(runner.measure_offline), {}

    def offline_once(model_dir: Path, text: Path, request: Any, work_dir: Path) -> Any:
        return offline(model_dir, text, request, tmp_path)

    def served_once(engine: Any, texts: Any, directory: Path) -> Any:
        (known,) = texts
        if id(known) not in served:
            served[id(known)] = measure_served(engine, texts, directory)
        return served[id(known)]

    def compared_once(folder: Path) -> Any:
        return kernels.setdefault(folder.name, read_kernels(folder))

    kernels: dict[str, Any] = {}
    read_kernels = runner.parity_file.read
    monkeypatch.setattr(runner.parity_file, "read", compared_once)
    measure_served = runner.measure_served
    monkeypatch.setattr(runner, "measure_offline", offline_once)
    monkeypatch.setattr(runner, "measure_served", served_once)
    before = dict(os.environ)
    code, report = run_gate(tmp_path, *pair, max_ppl_increase=100.0)
    assert set_by_a_start(dict(os.environ)) == set_by_a_start(before), "the process is left as it was"
    results = {result["check"]: result for result in report["results"]}
    assert code == 0, capsys.readouterr()
    assert report["verdict"] == "pass"
    assert results["parity"]["numbers"]["candidate_relative_difference"] < 1e-3
    assert results["memory"]["numbers"]["fraction"] == pytest.approx(0.5 + 1 / 32, rel=0.06)
    assert report["provenance"]["base_matches"] is True
    memory = report["evidence"]["memory"]
    for role, directory in zip(("base", "candidate"), pair, strict=True):
        assert memory[role]["weight_bytes"] == (directory / "model.safetensors").stat().st_size
        assert memory[role]["processes"] >= 1 and memory[role]["peak_rss_bytes"] > 100_000_000
    (text,) = report["evidence"]["texts"]
    assert len(text["candidate"]["served"]["nll_per_window"]) == 24
    assert text["candidate"]["served"]["protocol"]["bos"] is True
    assert str(tmp_path) not in json.dumps(report)
    assert "# Gate: PASS" in capsys.readouterr().out

    code, report = run_gate(tmp_path, *pair, max_ppl_increase=-0.9)
    assert code == 1
    verdicts = {result["check"]: result["verdict"] for result in report["results"]}
    assert verdicts == {"kernels": "pass", "memory": "pass", "parity": "pass", "quality": "fail"}
    assert len(served) == 2, "each model was measured once"


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
