"""What is said about layers that stay dense: before a run, after it, and by `inspect`; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maskgen.api.events import Planned
from maskgen.cli import kept
from maskgen.hf.dense import KeptDense
from tests import models
from tests.directories import edit_config
from tests.families import FAMILIES
from tests.maskgen.cli.test_parser import run

EXPERTS = KeptDense("experts", 12, 0.8561, "because")
GATE = KeptDense("layers.*.gate", 2, 0.0004, "a router")


def test_a_model_that_is_pruned_nearly_whole_needs_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    kept.print_planned(Planned("Llama", 21, 0.95, [EXPERTS], is_checked=True))
    assert capsys.readouterr() == ("", "")


def test_small_parts_and_unknown_models_are_told_of_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    kept.print_planned(Planned("Some", 8, 0.143, [EXPERTS, GATE], is_checked=False))
    assert capsys.readouterr().out.splitlines() == [
        "Some: not checked against vLLM, so whether it serves these layers packed is known only when it does",
        "only 14.3 % of the weights in decoder blocks will be pruned (8 layers); these stay dense: experts 85.6 %, "
        "layers.*.gate <0.1 %",
    ]


def test_run_and_inspect_say_what_stays_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = FAMILIES["mixtral"].save(tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "out"
    capsys.readouterr()
    code, text, errors = run(capsys, "run", "magnitude", "--model", dense, "--out", out)
    before, *_ = text.splitlines()
    assert (code, errors) == (0, "") and before.startswith("only 14.2 % of the weights in decoder blocks will be")
    lines = [line for line in text.splitlines() if line.startswith("  kept dense: ")]
    assert lines[0].startswith("  kept dense: experts, 85.") and " % of the weights in decoder blocks: " in lines[0]
    assert lines[1].startswith("  kept dense: model.layers.*.block_sparse_moe.gate (2 layers), 0.")
    assert [line for line in run(capsys, "inspect", out)[1].splitlines() if "kept dense" in line] == lines
    report = json.loads(run(capsys, "inspect", out, "--json")[1])
    assert [one["name"] for one in report["kept"]] == ["experts", "model.layers.*.block_sparse_moe.gate"]
    assert report["kept"][0]["share"] == pytest.approx(0.8546, abs=0.0005)
    assert run(capsys, "inspect", dense, "--json")[1].count('"kept": []') == 1


@pytest.mark.parametrize("verb", ["run wanda", "run maskllm", "eval"])
def test_a_tokenizer_with_more_tokens_than_the_model(
    verb: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = models.save("llama", tmp_path / "dense", vocab_size=models.VOCABULARY - 40)
    model, out = (dense,) if verb == "eval" else ("--model", dense), ("--out", tmp_path / "out")
    window = ("--window", 16) if verb == "eval" else ("--set", "calibration.window_tokens=16", *out)
    capsys.readouterr()
    learned = ("--set", "train.window_tokens=16", "--set", "train.heldout_windows=4") if "maskllm" in verb else ()
    code, _, errors = run(capsys, *verb.split(), *model, "--data", text_file, *window, *learned)
    assert code == 2 and errors.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "dense: the text has token 319 (" in errors and "but the model's embedding has 280 rows" in errors


def test_odd_widths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = models.save("llama", tmp_path / "dense", intermediate_size=100), tmp_path / "out"
    code, text, _ = run(capsys, "run", "magnitude", "--model", dense, "--out", out)
    assert code == 0 and "mlp.down_proj (3 layers), " in text and "in_features 100 is not a multiple of 8" in text
    every = models.save("gpt_neox", tmp_path / "every", hidden_size=60, intermediate_size=100)
    capsys.readouterr()
    code, _, errors = run(capsys, "run", "magnitude", "--model", every, "--out", tmp_path / "none")
    assert code == 2 and errors.count("\n") == 1 and not (tmp_path / "none.work").exists()
    assert "GPTNeoXForCausalLM: nothing to prune with pattern 2:4: all 12 linear layers of its decoder blocks" in errors
    assert "such as gpt_neox.layers.0.attention.query_key_value: in_features 60 is not a multiple of 8" in errors


def test_a_model_that_vllm_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = models.save("llama", tmp_path / "dense")
    capsys.readouterr()
    edit_config(dense, lambda config: config.update(architectures=["NobodyForCausalLM"]))
    argv = ["run", "magnitude", "--model", dense, "--out", tmp_path / "out"]
    code, _, errors = run(capsys, *argv)
    assert code == 2 and errors.startswith("maskgen: error: NobodyForCausalLM: vLLM ") and "--allow-unserved" in errors
    code, text, errors = run(capsys, *argv, "--allow-unserved")
    assert (code, errors) == (0, "") and text.startswith("NobodyForCausalLM: not checked against vLLM")
