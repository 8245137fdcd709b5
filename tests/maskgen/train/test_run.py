"""`maskgen run` with learned methods, from the command line to a model that says what the log said of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.digest import digest_weights
from maskgen.core.lock import exclusive
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from maskgen.export import compress
from maskgen.hf import model
from maskgen.methods.learned import LearnedMethod, Result
from maskgen.recipes import recipe
from maskgen.train import prior
from maskgen.train import run as learn
from maskgen.train.log import LOG_FILE, read
from tests import models
from tests.maskgen.cli.test_parser import run

ModelDir = Callable[..., Path]

SHORT = [
    *("--set", "train.steps=4", "--set", "train.batch=4", "--set", "train.window_tokens=16"),
    *("--set", "train.heldout_windows=5", "--set", "train.dtype=float32", "--eval-every", "2"),
    *("--set", "calibration.samples=6", "--set", "calibration.window_tokens=16"),
]
LEARNED = [name for name in recipe.names() if isinstance(recipe.load(name).build_method(), LearnedMethod)]
NARROW = ["--set", "method.ffn_multiple=16"]
FOR_TINY_MODELS = dict.fromkeys(["maskprune", "structured_magnitude", "structured_taylor"], NARROW)
"""Their defaults are for models whose layers are wider."""
BARE = '[method]\nname = "maskllm"\n'


def words(name: str, dense: Path, text: Path, out: Path) -> list[object]:
    return ["run", name, "--model", dense, "--data", text, "--out", out, *SHORT, *FOR_TINY_MODELS.get(name, [])]


def settled(name: str) -> recipe.Recipe:
    flags = [*SHORT, *FOR_TINY_MODELS.get(name, [])]
    return recipe.load(name, [value for value in flags if "." in value]).for_context(models.MAX_TOKENS).on_device("cpu")


@torch.no_grad()
def measured(out: Path, dense: Path, text: Path, settings: recipe.Recipe) -> float:
    """The loss of what was written, on the text that was held out, by transformers alone."""
    heldout_ST = learn.read_corpus(settings, [text], dense, out.parent / "cache").heldout
    return float(model.load(out, torch.float32)(input_ids=heldout_ST, labels=heldout_ST).loss)


@pytest.mark.parametrize("name", LEARNED)
def test_shipped_recipes_write_what_they_measured(
    name: str, model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = model_dir(), tmp_path / "out"
    code, text, errors = run(capsys, *words(name, dense, text_file, out))
    assert (code, errors) == (0, "")
    settings = settled(name)
    records = read(out / LOG_FILE)
    looks = [record for record in records if record["kind"] == "eval"]
    assert measured(out, dense, text_file, settings) == pytest.approx(looks[-1]["heldout_nll"], rel=1e-4)
    assert measured(dense, dense, text_file, settings) == pytest.approx(looks[0]["dense_nll"], rel=1e-5)
    assert f"perplexity {looks[0]['perplexity']:.2f} at the start -> {looks[-1]['perplexity']:.2f}" in text
    assert f"dense {math.exp(looks[0]['dense_nll']):.2f}" in text and f"log in {out / LOG_FILE}" in text
    assert "4 steps, 256 tokens" in text and f"maskgen eval {out}" in text

    header = records[0]
    assert header["recipe"] == json.loads((out / recipe.RECIPE_FILE).read_text()) == settings.resolved()
    assert header["digests"] == json.loads((out / learn.PROVENANCE_FILE).read_text())
    assert header["digests"]["recipe"] == settings.digest() and header["digests"]["base"] == digest_weights(dense)
    method = settings.build_method()
    assert isinstance(method, LearnedMethod)
    starts = {"prior": settings.prior is not None and not method.uses_prior_weights, "start": method.uses_prior_weights}
    assert {kind: header["digests"].get(kind) is not None for kind in starts} == starts
    assert (header["reference"] == "prior") == starts["prior"]
    assert header["data"] == [text_file.name] and header["heldout_windows"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"], "OUT.work is gone"
    assert is_sparse_checkpoint(out) == (method.result is Result.SPARSE)
    if method.result is Result.SPARSE:
        checkpoint = SparseCheckpoint.open(out)
        assert checkpoint.config.recipe_digest == settings.digest()
        assert checkpoint.config.base_digest == digest_weights(dense)
        assert list(checkpoint.config.targets) == sorted(header["layers"])
        if not method.trains_weights:
            weights = load_file(dense / "model.safetensors")
            for target in checkpoint.config.targets:
                packed = checkpoint.packed(target)
                assert torch.equal(packed.unpack(), weights[f"{target}.weight"] * packed.mask())


def test_stored_dtype_survives_float32_training(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = model_dir("llama_tied", dtype=torch.bfloat16), tmp_path / "out"
    argv = [*words("adaptive_sparse", dense, text_file, out), "--set", "train.scope=all", "--set", "train.lr=1e-2"]
    assert run(capsys, *argv)[0] == 0
    before, after = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    values = {name: tensor for name, tensor in after.items() if tensor.dtype != torch.uint8}
    assert {tensor.dtype for tensor in values.values()} == {torch.bfloat16}
    others = set(before) & set(after)
    assert "model.embed_tokens.weight" in others and "model.norm.weight" in others
    assert not [name for name in others if torch.equal(before[name], after[name])], "scope = all trains them"
    last = [record for record in read(out / LOG_FILE) if record["kind"] == "eval"][-1]
    assert measured(out, dense, text_file, settled("adaptive_sparse")) == pytest.approx(last["heldout_nll"], rel=5e-3)


def test_a_tied_model_with_frozen_weights(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head is the embedding under another name; neither was trained."""
    dense, out = model_dir("llama_tied"), tmp_path / "out"
    assert run(capsys, *words("maskllm", dense, text_file, out), "--checkpoint-activations")[::2] == (0, "")
    last = [record for record in read(out / LOG_FILE) if record["kind"] == "eval"][-1]
    assert measured(out, dense, text_file, settled("maskllm")) == pytest.approx(last["heldout_nll"], rel=1e-4)


def prior_masks(dense: Path, pattern: str = "2:4") -> MaskSet:
    return models.magnitude_masks(dense, NMPattern.parse(pattern))


@pytest.mark.parametrize("form", ["file", "checkpoint"])
def test_a_given_prior_replaces_the_recipes(
    form: str, model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out, given = model_dir(), tmp_path / "out", tmp_path / "prior.safetensors"
    masks = prior_masks(dense)
    if form == "file":
        masks.save(given)
    else:
        compress.compress_masks(dense, masks, given, ("lm_head",))
    own = tmp_path / "masks.safetensors"
    argv = [*words("maskllm", dense, text_file, out), "--set", "train.lr=1e-9", "--prior", given, "--masks-out", own]
    assert run(capsys, *argv)[0] == 0
    header, first, *_ = read(out / LOG_FILE)
    assert header["digests"]["prior"] == masks.digest() and first["agreement"] == 1
    assert MaskSet.load(own).digest() == masks.digest() == SparseCheckpoint.open(out).config.mask_digest
    other = run(capsys, *words("maskllm", dense, text_file, tmp_path / "other"))
    assert other[0] == 0 and read(tmp_path / "other" / LOG_FILE)[0]["digests"]["run"] != header["digests"]["run"]


def test_a_domain_mask_starts_from_a_general_one(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output of one run is the prior of the next."""
    dense = model_dir()
    assert run(capsys, *words("maskllm", dense, text_file, tmp_path / "general"))[0] == 0
    argv = [*words("maskllm", dense, text_file, tmp_path / "domain"), "--prior", tmp_path / "general"]
    assert run(capsys, *argv)[0] == 0
    general = SparseCheckpoint.open(tmp_path / "general").config.mask_digest
    assert read(tmp_path / "domain" / LOG_FILE)[0]["digests"]["prior"] == general


def test_held_out_text_is_seen_by_nobody(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    seen = []
    swept = prior.sweep
    monkeypatch.setattr(prior, "sweep", lambda *args: seen.append(args[3]) or swept(*args))
    out = tmp_path / "out"
    argv = words("maskllm", model_dir(), text_file, out)
    assert run(capsys, *argv, "--set", "train.heldout_windows=600", "--set", "calibration.samples=200")[0] == 0
    settings = recipe.load("maskllm", ["train.window_tokens=16", "train.heldout_windows=600"])
    corpus = learn.read_corpus(settings, [text_file], model_dir(), tmp_path / "cache")
    training = corpus.files[0].flatten().tolist()
    (windows_ST,) = seen
    places = {tuple(training[start : start + 16]) for start in range(len(training) - 15)}
    assert len(windows_ST) == 200 and {tuple(window) for window in windows_ST.tolist()} <= places
    assert len({tuple(window) for window in windows_ST.tolist()}) > 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{bare}", "--data", "{text}"], "maskllm starts from a mask: give --prior, or a [prior] section"),
        (["maskllm"], "maskllm learns from text; give it with --data"),
        (["maskllm", "--data", "{tmp}/no"], "no: cannot be read"),
        (["maskllm", "--data", "{text}", "--prior", "{text}"], "not a valid safetensors file"),
        (["maskllm", "--data", "{text}", "--prior", "{tmp}/no"], "no such file"),
        (["maskllm", "--data", "{text}", "--prior", "{tmp}/foreign"], "a mask is only valid for the weights it was"),
        (["maskllm", "--data", "{text}", "--prior", "{tmp}/1in4"], "1in4: its pattern is 1:4, the recipe's is 2:4"),
        (["maskllm", "--data", "{text}", "--prior", "{tmp}/few"], "the prior has no mask for model.layers.0."),
        (
            ["maskllm", "--data", "{text}", "--prior", "{tmp}/few", "--set", "method.prior_strength=0"],
            "few: maskllm with these options starts from no mask; leave it out",
        ),
        (["magnitude", "--prior", "{tmp}/few"], "magnitude with these options starts from no mask"),
        (["magnitude", "--micro-batch", "2"], "--micro-batch: magnitude is a one-shot method and does not train"),
        (["magnitude", "--checkpoint-activations"], "--checkpoint-activations: magnitude is a one-shot method"),
        (["maskllm", "--data", "{text}", "--set", "train.window_tokens=129"], "windows of 129 tokens, but the model"),
        (["maskllm", "--data", "{text}", "--set", "train.heldout_windows=100000"], "lower train.heldout_windows"),
        (["maskllm", "--data", "{text}", "--set", "train.scope=all"], "train.scope: maskllm learns masks for frozen"),
        (["maskllm", "--data", "{text}", "--set", "calibration.window_tokens=20000"], "the model reads at most 128"),
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
    dense, bare = model_dir(), tmp_path / "bare.toml"
    bare.write_text(BARE)
    masks = prior_masks(dense)
    prior_masks(dense, "1:4").save(tmp_path / "1in4")
    MaskSet(masks.pattern, masks.bitmasks, "sha256:" + "0" * 64, masks.recipe_digest).save(tmp_path / "foreign")
    few = {name: masks.bitmasks[name] for name in masks.names[1:]}
    MaskSet(masks.pattern, few, masks.base_digest, masks.recipe_digest).save(tmp_path / "few")
    places = {"tmp": tmp_path, "text": text_file, "bare": bare}
    name, *flags = (part.format(**places) for part in argv)
    small = ["--set", "train.window_tokens=16", "--set", "train.steps=2", "--set", "calibration.samples=2"]
    wanted = [] if name == "magnitude" else small
    code, _, errors = run(capsys, "run", name, "--model", dense, "--out", tmp_path / "o", *wanted, *flags)
    assert code == 2 and errors.startswith("maskgen: error: ") and errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flag", ["--micro-batch", "--eval-every", "--checkpoint-every", "--keep-checkpoints"])
def test_counts_are_counts(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "-1", "x", "1.5"):
        with pytest.raises(SystemExit) as stopped:
            run(capsys, "run", "maskllm", "--model", "m", "--out", "o", flag, value)
        assert stopped.value.code == 2 and f"'{value}' is not a whole number" in capsys.readouterr().err


def test_another_run_in_the_same_place_is_refused(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words("maskllm", model_dir(), text_file, tmp_path / "out")
    assert run(capsys, *argv, "--keep-work")[0] == 0
    (tmp_path / "out").rename(tmp_path / "first")
    code, _, errors = run(capsys, *argv, "--set", "train.lr=2e-3")
    assert code == 2 and "out.work: belongs to another run" in errors
    assert run(capsys, *argv)[0] == 0
    first, second = (SparseCheckpoint.open(tmp_path / name) for name in ("first", "out"))
    assert first.config == second.config


def test_two_processes_do_not_share_a_run(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words("maskllm", model_dir(), text_file, tmp_path / "out")
    assert run(capsys, *argv, "--keep-work")[0] == 0
    (tmp_path / "out").rename(tmp_path / "first")
    with exclusive(tmp_path / "out"):
        code, _, errors = run(capsys, *argv)
    assert code == 2 and f"out: process {os.getpid()} on " in errors and "is writing it; wait for it" in errors
    assert run(capsys, *argv)[0] == 0


def test_flags_about_the_machine_change_no_bit(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint-activations", "--checkpoint-every", "1", "--keep-checkpoints", "1"]
    assert run(capsys, *words("adaptive_sparse", model_dir(), text_file, tmp_path / "one"))[0] == 0
    assert (
        run(capsys, *words("adaptive_sparse", model_dir(), text_file, tmp_path / "two"), *flags, "--keep-work")[0] == 0
    )
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert [path.name for path in (tmp_path / "two.work" / "checkpoints").iterdir()] == ["step-000004"]
