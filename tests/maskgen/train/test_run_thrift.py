"""A learned run holds nothing twice, does nothing twice, and multiplies in what its device is fast in.

What would stop it at its end it says at its start.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.hf import model, planning
from maskgen.methods.learned import LearnedLinear
from maskgen.numerics import products
from maskgen.recipes.recipe import RECIPE_FILE
from maskgen.train import prior
from maskgen.train import run as learn
from maskgen.train.log import LOG_FILE, read
from maskgen.train.parallel import ALONE, Group
from maskgen.train.step import Session
from tests import models
from tests.maskgen.cli.test_parser import run
from tests.maskgen.train.test_run import measured, settled, words

ModelDir = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def ignore(event: object) -> None:
    pass


def refuse(*args: object) -> None:
    raise AssertionError("this should not have been reached")


@dataclass(frozen=True)
class HalfGroup(Group):
    """Process 0 of two, whose partner never says a word."""

    world: int = 2

    def wrap(self, model: nn.Module, blocks: object) -> nn.Module:
        return model

    def wait(self) -> None:
        pass

    def broadcast(self, find: Callable[[], str]) -> str:
        return find()

    def total(self, values: Tensor) -> Tensor:
        return values


def last_look(out: Path) -> float:
    return float([record for record in read(out / LOG_FILE) if record["kind"] == "eval"][-1]["heldout_nll"])


def test_layers_that_were_replaced_are_let_go(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold whole weights, of which a process that shards keeps but its rows."""
    planned, fit = planning.plan_of, learn.fit
    given: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    counts: list[int] = []

    def watched(*args: Any, **named: Any) -> planning.Plan:
        plan = planned(*args, **named)
        given.update(item for block in plan.targets for item in block.values() if not item.weight.is_meta)
        counts.append(len(given))
        return plan

    def fitting(*args: Any) -> None:
        gc.collect()
        counts.append(len(given))
        fit(*args)

    monkeypatch.setattr(planning, "plan_of", watched)
    monkeypatch.setattr(learn, "fit", fitting)
    assert run(capsys, *words("adaptive_sparse", model_dir(), text_file, tmp_path / "out"))[0] == 0
    assert 7 * models.LAYERS in counts and counts[-1] == 0


def test_the_result_of_several_processes_is_put_together_without_what_trained_it(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def halved(device: str, shard: bool) -> Iterator[Group]:
        yield HalfGroup()

    sessions: list[Session] = []
    prepare = learn.prepare
    monkeypatch.setattr(learn, "joined", halved)
    monkeypatch.setattr(learn, "prepare", lambda *args: sessions.append(prepare(*args)) or sessions[-1])
    dense, out = model_dir(), tmp_path / "out"
    argv = [*words("adaptive_sparse", dense, text_file, out), "--set", "train.distill_weight=0.5"]
    assert run(capsys, *argv, "--set", "train.lr=1e-2")[0] == 0
    trained, lean = sessions
    assert trained.objective.teacher is not None and trained.optimizer.state
    assert lean.objective.teacher is None and not lean.optimizer.state and lean.step == trained.step
    assert all(parameter.grad is None for parameter in lean.parameters)
    assert measured(out, dense, text_file, settled("adaptive_sparse")) == pytest.approx(last_look(out), rel=1e-4)


def test_float32_is_float32_for_frozen_weights_too(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = model_dir(dtype=torch.bfloat16), tmp_path / "out"
    seen: list[torch.dtype] = []
    prepare = learn.prepare
    monkeypatch.setattr(learn, "prepare", lambda *args: seen.append(args[0].dtype) or prepare(*args))
    assert run(capsys, *words("maskllm", dense, text_file, out))[0] == 0
    assert seen == [torch.float32]
    stored, checkpoint = load_file(dense / "model.safetensors"), SparseCheckpoint.open(out)
    for target in checkpoint.config.targets:
        packed, weight_OI = checkpoint.packed(target), stored[f"{target}.weight"]
        assert packed.values.dtype == torch.bfloat16 and torch.equal(packed.unpack(), weight_OI * packed.mask())
    assert measured(out, dense, text_file, settled("maskllm")) == pytest.approx(last_look(out), rel=1e-5)
    assert run(capsys, *words("maskllm", dense, text_file, tmp_path / "b"), "--set", "train.dtype=bfloat16")[0] == 0
    assert seen[1:] == [torch.bfloat16]


@pytest.mark.parametrize("name", ["maskprune", "structured_magnitude", "dense_control"])
def test_a_result_without_masks_has_none_to_write(
    name: str, model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = [*words(name, model_dir(), text_file, tmp_path / "out"), "--masks-out", tmp_path / "masks"]
    code, _, errors = run(capsys, *argv)
    assert code == 2 and "writes a dense model, without masks; leave it out" in errors
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("name", ["maskprune", "structured_magnitude"])
def test_widths_that_nobody_could_load_are_refused_before_training(
    name: str, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "fit", refuse)
    dense = models.save("llama", tmp_path / "dense", num_attention_heads=4, num_key_value_heads=4)
    argv = words(name, dense, text_file, tmp_path / "out")
    for setting in ("keep_kv_groups=3", "heads_divide_hidden=false", "keep_ffn=64"):
        argv += ["--set", f"method.{setting}"]
    code, _, errors = run(capsys, *argv)
    assert code == 2 and "llama with 3 of 4 heads beside a hidden size of 64 cannot be loaded" in errors


def test_tensors_that_are_stored_under_other_names_are_refused_before_training(
    text_file: Path, model_dir: ModelDir, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers loads the bare decoder of a tied model, too, whose names lack a prefix."""
    monkeypatch.setattr(learn, "fit", refuse)
    dense: Any = model.load(model_dir("llama_tied"))
    dense.model.save_pretrained(tmp_path / "bare")
    model.load_tokenizer(model_dir("llama_tied")).save_pretrained(tmp_path / "bare")
    argv = words("dense_control", tmp_path / "bare", text_file, tmp_path / "out")
    code, _, errors = run(capsys, *argv)
    assert code == 2 and "a LlamaModel, expected a causal language model" in errors
    config = tmp_path / "bare/config.json"
    config.write_text(config.read_text().replace('"LlamaModel"', '"LlamaForCausalLM"'))
    code, _, errors = run(capsys, *argv)
    assert code == 2 and "no tensor model.layers.0.self_attn.q_proj.weight is stored" in errors


def test_a_prior_is_made_once(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By process 0: the others, and a run that goes on, read its file, and trust only what is whole and theirs."""
    dense, out = model_dir(), tmp_path / "out"
    argv = [*words("maskllm", dense, text_file, out), "--keep-work"]
    assert run(capsys, *argv)[0] == 0
    out.rename(tmp_path / "first")
    monkeypatch.setattr(prior, "sweep", refuse)
    assert run(capsys, *argv)[0] == 0
    one, two = (read(path / LOG_FILE)[0]["digests"] for path in (tmp_path / "first", out))
    assert one == two

    wanted, work = settled("maskllm"), tmp_path / "out.work"
    corpus = learn.read_corpus(wanted, [text_file], dense, tmp_path / "cache")
    masks, spent = prior.make_prior(wanted, corpus, dense, work, one["base"], Group(1, 2), ignore)
    assert spent is None and masks.digest() == one["prior"]
    with pytest.raises(FormatError, match="another model or by another recipe; delete it"):
        prior.make_prior(wanted, corpus, dense, work, "sha256:" + "0" * 64, ALONE, ignore)
    file = work / prior.PRIOR_FILE
    MaskSet(masks.pattern, masks.bitmasks, masks.base_digest, "sha256:" + "0" * 64).save(file)
    with pytest.raises(FormatError, match="another model or by another recipe; delete it"):
        prior.make_prior(wanted, corpus, dense, work, one["base"], ALONE, ignore)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"prior\.safetensors: .*; delete it to have it made again"):
        prior.make_prior(wanted, corpus, dense, work, one["base"], Group(1, 2), ignore)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_arithmetic_of_a_run_is_that_of_its_device_and_stands_beside_the_result(
    dtype: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda device: dtype == "bfloat16")
    seen, forward = set(), LearnedLinear.forward

    def watched(layer: LearnedLinear, x: Tensor) -> Tensor:
        y = forward(layer, x)
        seen.add(y.dtype)
        return y

    monkeypatch.setattr(LearnedLinear, "forward", watched)
    out = tmp_path / "out"
    code, _, errors = run(capsys, *words("maskllm", model_dir(), text_file, out), "--set", "train.dtype=auto")
    assert (code, errors) == (0, "")
    assert seen == {getattr(torch, dtype)}
    assert json.loads((out / RECIPE_FILE).read_text())["train"]["dtype"] == dtype
