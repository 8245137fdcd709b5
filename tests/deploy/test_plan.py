"""`deploy/train/plan.py`: shapes are those of real models, formulas fit what was measured, tables are the page's."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maskgen.core.pattern import NMPattern
from maskgen.hf.planning import plan_of
from tests import models
from tests.architecture.source import ROOT
from tests.deploy import scripts

RESULTS = ROOT / "tests/bench/results"


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    return scripts.load("train/plan.py")


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text("utf-8"))


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3"])
def test_weights_are_those_of_the_model(kind: str, plan: ModuleType, tmp_path: Path) -> None:
    models.save(kind, tmp_path)
    shape = plan.Shape.of(json.loads((tmp_path / "config.json").read_text()))
    targets = plan_of(tmp_path, NMPattern(2, 4)).targets
    assert shape.prunable == sum(linear.weight.numel() for block in targets for linear in block.values())
    matrices = (parameter for parameter in models.build(kind).parameters() if parameter.ndim == 2)
    assert shape.stored == sum(parameter.numel() for parameter in matrices)


@pytest.mark.parametrize(("name", "billions"), [("8b", 8.03), ("70b", 70.6), ("405b", 405.9)])
def test_known_models_have_the_size_of_their_names(name: str, billions: float, plan: ModuleType) -> None:
    assert plan.MODELS[f"llama-3.1-{name}"].stored == pytest.approx(billions * 1e9, rel=0.005)


def test_the_rate_of_training_is_the_measured_one(plan: ModuleType) -> None:
    measured = result("gpu-learned--smollm2-135m-adaptive_sparse--nvidia-h200--20261126-042200.json")
    smollm2 = plan.Shape(576, 1536, 30, 9, 3, 64, 49152, True)
    assert smollm2.used * 8 * measured["tokens_per_s"] == pytest.approx(plan.MEASURED_GPU_FLOPS, rel=0.01)


def test_a_sweep_takes_what_was_measured(plan: ModuleType) -> None:
    """Two recipes on one machine: neither the ratio of their times nor memory depends on the machine."""
    measured = result("sweep-cost--llama-640x14--x86_64-2core--20261122-0724.json")
    found = {row["recipe"]: row for row in measured["rows"]}
    shape = plan.Shape(640, 1920, 14, 10, 5, 64, 4096, False)
    assert shape.prunable == pytest.approx(1e6 * found["wanda"]["million_weights"], rel=0.001)
    samples = measured["calibration"]["samples"] * measured["calibration"]["window_tokens"] // plan.WINDOW_T
    wanda, sparsegpt = (
        plan.Sweep(samples=samples, grams=grams, products=products).cost(shape, 1e12, 0)
        for grams, products in ((0, 0), (1, 0.5))
    )
    times = found["sparsegpt"]["sweep_s"] / found["wanda"]["sweep_s"]
    assert sparsegpt.flop / wanda.flop == pytest.approx(times, rel=0.1)
    row = found["sparsegpt"]
    peak = row["peak_rss_bytes"] - row["before_model_bytes"] - row["dense_model_bytes"]
    assert sparsegpt.gpu_bytes == pytest.approx(peak, rel=0.1)


def test_what_does_not_fit_is_said(plan: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["llama-3.1-405b", "--gpu-gb", "80"]) == 0
    assert "| `maskllm` | too small: 1" in capsys.readouterr().out


def test_a_model_of_another_kind_is_refused(
    plan: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.save("opt", tmp_path)
    for name in (tmp_path / "config.json", tmp_path / "none"):
        with pytest.raises(SystemExit):
            plan.main([str(name)])
        assert "neither a config.json of a Llama" in capsys.readouterr().err


def test_the_page_has_the_tables(plan: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([])
    page = (ROOT / "docs/plan.md").read_text("utf-8")
    shown = page.partition("<!-- plan -->\n")[2].partition("<!-- end -->")[0]
    assert shown.strip() == capsys.readouterr().out.strip()
