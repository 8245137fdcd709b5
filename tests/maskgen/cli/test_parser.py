"""The `maskgen` command from end to end in one process: help, results, and one line for every mistake."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgen.api import measuring, pruning
from maskgen.api.requests import EvaluateRequest
from maskgen.cli import parser as cli
from maskgen.cli import verbs
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import digest_weights
from maskgen.core.mask import MaskSet
from maskgen.hf import model
from maskgen.recipes.recipe import RECIPE_FILE, load
from tests import models
from tests.directories import edit_config

ModelDir = Callable[..., Path]
LONG = ["--set", f"calibration.window_tokens={models.MAX_TOKENS + 1}"]
SMALL = ["--set", "calibration.window_tokens=32", "--set", "calibration.samples=6"]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    (actions,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return actions.choices


def test_every_flag_is_explained_with_its_default() -> None:
    parsers = verb_parsers()
    assert set(parsers) == set(verbs.VERBS)
    for verb, parser in parsers.items():
        assert parser.description
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                assert action.help and (action.required or "default:" in action.help), (verb, action.option_strings)
            elif action.dest != "help":
                assert action.help, (verb, action.dest)
        parser.format_help()


def test_what_is_not_typed_is_left_to_the_request() -> None:
    args = verb_parsers()["eval"].parse_args(["m", "--data", "f", "--window", "32"])
    assert vars(args) == {"model": "m", "data": [Path("f")], "window_tokens": 32}
    assert verbs.request(EvaluateRequest, args) == EvaluateRequest(model="m", data="f", window_tokens=32)


def test_errors_of_the_interface_name_the_flag_that_was_typed() -> None:
    message = "`micro_batch` 0, `window_tokens`, `overrides` and `data`; not `self`, nor `maskgen run`"
    assert cli.in_flags(message) == "--micro-batch 0, --window, --set and --data; not `self`, nor `maskgen run`"


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"]])
def test_help_needs_no_torch(argv: list[str]) -> None:
    code = (
        "import sys; from maskgen.cli.parser import main\ntry: main(sys.argv[1:])\nfinally: print(sorted(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert "usage: maskgen" in result.stdout
    assert argv == ["--help"] or "--prior MASKS" in result.stdout, "a directory is taken, too"
    loaded = result.stdout.splitlines()[-1]
    assert "'argparse'" in loaded and "'torch'" not in loaded and "'transformers'" not in loaded


def test_python_m_maskgen_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "maskgen"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "usage: maskgen" in result.stderr


def test_run_eval_inspect_compress_decompress(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out, masks = model_dir("qwen2", dtype=torch.bfloat16), tmp_path / "sparse", tmp_path / "masks.safetensors"
    code, text, errors = run(
        capsys, "run", "wanda", "--model", dense, "--data", text_file, "--out", out, "--masks-out", masks, *SMALL
    )
    assert (code, errors) == (0, "")
    assert "pruned 21 layers" in text and "(56.25%)" in text and f"maskgen eval {out}" in text
    assert not (tmp_path / "sparse.work").exists()

    checkpoint = SparseCheckpoint.open(out)
    wanted = load("wanda", [value for value in SMALL if value != "--set"])
    assert checkpoint.config.recipe_digest == wanted.digest()
    assert json.loads((out / RECIPE_FILE).read_text()) == wanted.resolved()
    assert checkpoint.config.base_digest == digest_weights(dense)
    assert checkpoint.config.base_model == "model" and checkpoint.config.ignored == ("lm_head",)
    assert checkpoint.config.mask_digest == checkpoint.mask_set().digest() == MaskSet.load(masks).digest()
    assert (out / "tokenizer.json").is_file()

    assert run(capsys, "compress", dense, masks, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert SparseCheckpoint.open(tmp_path / "again").config == checkpoint.config
    assert run(capsys, "decompress", out, "--out", tmp_path / "dense")[0] == 0

    sparse_state, dense_state = (model.load(path).state_dict() for path in (out, tmp_path / "dense"))
    assert all(torch.equal(dense_state[name], tensor) for name, tensor in sparse_state.items())

    scores = {}
    for name in ("sparse", "dense"):
        json_path = tmp_path / f"{name}.json"
        code, text, _ = run(
            capsys,
            "eval",
            tmp_path / name,
            "--data",
            text_file,
            "--window",
            32,
            "--max-windows",
            5,
            "--json",
            json_path,
        )
        assert code == 0 and "5 windows, 155 scored tokens, window 32, non-overlapping, no BOS" in text
        scores[name] = json.loads(json_path.read_text())
        assert f"perplexity {scores[name]['perplexity']:.4f}" in text and scores[name]["dtype"] == "bfloat16"
    assert scores["sparse"]["nll_per_window"] == scores["dense"]["nll_per_window"]

    code, text, _ = run(capsys, "inspect", out)
    assert code == 0 and "21 of 22 matrices packed" in text
    code, text, _ = run(capsys, "inspect", tmp_path / "dense", "--json")
    follows = {layer["name"]: layer["follows"] for layer in json.loads(text)["layers"]}
    assert code == 0 and follows["model.layers.0.mlp.up_proj"] and not follows["model.embed_tokens"]


def test_a_run_without_data_and_with_kept_work(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "magnitude", "--model", model_dir(), "--out", tmp_path / "out", "--set", "ignore=['*.o_proj']"]
    code, text, _ = run(capsys, *argv, "--keep-work")
    assert code == 0 and "kept dense: model.layers.*.self_attn.o_proj (3 layers), 13.3 % of" in text
    assert len(list((tmp_path / "out.work").glob("block-*.safetensors"))) == models.LAYERS
    code, _, errors = run(capsys, *argv)
    assert code == 2 and errors.startswith("maskgen: error: ") and "out exists; remove it" in errors
    (tmp_path / "out").rename(tmp_path / "first")
    code, text, _ = run(capsys, *argv)
    assert code == 0 and "3 blocks were finished by an earlier run" in text
    first, second = (SparseCheckpoint.open(tmp_path / name) for name in ("first", "out"))
    assert first.config == second.config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "nope", "--model", "{dense}", "--out", "{tmp}/o"], "no recipe 'nope'; shipped recipes are"),
        (["run", "wanda", "--model", "{dense}", "--out", "{tmp}/o"], "give it with --data"),
        (["run", "wanda", "--model", "{dense}", "--data", "{tmp}/no", "--out", "{tmp}/o"], "no: cannot be read"),
        (
            ["run", "wanda", "--model", "{dense}", "--data", "{text}", "--out", "{tmp}/o", *LONG],
            "windows of 129 tokens, but the model reads at most 128",
        ),
        (["run", "magnitude", "--model", "{tmp}/no", "--out", "{tmp}/o"], "not a directory"),
        (["run", "magnitude", "--model", "{dense}", "--out", "{tmp}/o", "--set", "x=1"], "unknown key x"),
        (["run", "magnitude", "--model", "{dense}", "--out", "{tmp}/o", "--device", "cuda:99"], "--device cuda:99"),
        (["run", "magnitude", "--model", "{dense}", "--out", "{tmp}/o", "--device", "toaster"], "--device toaster"),
        (["eval", "{dense}", "--data", "{text}", "--window", "129"], "the model reads at most 128; lower --window"),
        (["eval", "{dense}", "--data", "{text}", "--window", "1"], "window 1"),
        (["eval", "{dense}", "--data", "{text}", "x.txt", "--windows-out", "w"], "w: holds the windows of one text"),
        (["eval", "{tmp}", "--data", "{text}"], "config.json: no such file"),
        (["eval", "{dense}", "--data", "{text}", "--json", "{text}/x.json"], "text.txt is not a directory"),
        (["eval", "{dense}", "--data", "{text}", "--windows-out", "/dev/null"], "/dev/null: not a regular file"),
        (["run", "magnitude", "--model", "{dense}", "--out", "{text}/o"], "text.txt is not a directory"),
        (["inspect", "{tmp}"], "no such file"),
        (["inspect", "{dense}", "--pattern", "4:2"], "pattern 4:2"),
        (["compress", "{dense}", "{text}", "--out", "{tmp}/o"], "not a valid safetensors file"),
        (["decompress", "{dense}", "--out", "{tmp}/o"], "a dense model"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    argv: list[str],
    message: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"dense": model_dir(), "tmp": tmp_path, "text": text_file}
    code, out, errors = run(capsys, *(part.format(**places) for part in argv))
    assert (code, out) == (2, "")
    assert errors.startswith("maskgen: error: ") and errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "o").exists()


def test_models_that_cannot_be_written_are_refused_before_the_work(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pruning, "sweep", lambda *args: pytest.fail("the work began"))
    models.save_sparse(model_dir(), tmp_path / "sparse")
    code, _, errors = run(capsys, "run", "magnitude", "--model", tmp_path / "sparse", "--out", tmp_path / "o")
    assert code == 2 and "sparse: already sparse; start from the dense model" in errors
    renamed = shutil.copytree(model_dir(), tmp_path / "renamed")
    tensors = load_file(renamed / "model.safetensors")
    unprefixed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(unprefixed, renamed / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = run(capsys, "run", "magnitude", "--model", renamed, "--out", tmp_path / "o")
    assert code == 2 and "no tensor model.layers.0.self_attn.q_proj.weight" in errors and "other names" in errors
    missing = shutil.copytree(model_dir(), tmp_path / "missing")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, missing / "model.safetensors", metadata={"format": "pt"})
    code, _, errors = run(capsys, "run", "magnitude", "--model", missing, "--out", tmp_path / "o")
    assert code == 2 and "q_proj.weight is missing in its files; download the model again" in errors
    oversized = shutil.copytree(model_dir(), tmp_path / "oversized")
    edit_config(oversized, lambda config: config.update(num_experts=10**6))
    code, _, errors = run(capsys, "run", "magnitude", "--model", oversized, "--out", tmp_path / "o")
    assert code == 2 and "num_experts 1000000" in errors and not (tmp_path / "o.work").exists()


def test_interrupt_and_bugs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    def bug(args: argparse.Namespace) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(verbs, "VERBS", {"inspect": stop, "decompress": bug})
    assert run(capsys, "inspect", "x") == (130, "", "maskgen: interrupted\n")
    with pytest.raises(ZeroDivisionError):
        run(capsys, "decompress", "x", "--out", "y")


def test_demo_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring.demo_module, "build", lambda out, progress: out)
    code, text, _ = run(capsys, "demo", "--out", tmp_path / "demo")
    assert code == 0 and f"--model {tmp_path}/demo/model --data {tmp_path}/demo/calibration.txt" in text
