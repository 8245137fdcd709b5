"""What `maskgen run` and `compress` promise beyond their results: no wasted work, no dead ends, no memory held."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from maskgen.api import pruning
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.pattern import NMPattern
from maskgen.hf import model
from maskgen.recipes.recipe import RECIPE_FILE, load
from tests import models
from tests.directories import edit_config
from tests.maskgen.cli.test_parser import SMALL, run

ModelDir = Callable[..., Path]


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "sparsegpt-mask-only"])
def test_shipped_recipes_run_as_they_are_on_a_short_model(
    name: str, model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, _, errors = run(capsys, "run", name, "--model", model_dir(), "--data", text_file, "--out", out)
    assert (code, errors) == (0, "")
    settled = load(name).for_context(models.MAX_TOKENS)
    stored = json.loads((out / RECIPE_FILE).read_text())
    assert stored == settled.resolved() and stored["calibration"]["window_tokens"] == models.MAX_TOKENS
    assert SparseCheckpoint.open(out).config.recipe_digest == settled.digest()


def test_a_mistake_corrected_is_not_another_run(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "sparsegpt", "--model", model_dir(), "--data", text_file, "--out", tmp_path / "out", *SMALL]
    code, _, errors = run(capsys, *argv, "--set", "method.block=12", "--set", "pattern=4:8")
    assert code == 2 and "method.block 12: not a multiple of 8" in errors
    code, _, errors = run(capsys, *argv, "--set", "ignore=['*.q_proj']")
    assert code == 2 and "leaves model.layers.0.self_attn.q_proj dense" in errors
    assert run(capsys, *argv)[0] == 0


def test_a_mixture_of_experts_without_dense_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`intermediate_size` is the size of a layer that it does not have."""
    config = Qwen3MoeConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=200,
        moe_intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[],
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    code, _, errors = run(capsys, "run", "magnitude", "--model", tmp_path / "dense", "--out", out)
    assert (code, errors) == (0, "")
    assert SparseCheckpoint.open(out).hf_config["intermediate_size"] == 200


def test_the_dense_model_is_gone_when_the_checkpoint_is_written(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model, write, loaded = model.load, pruning.compress.compress, []

    def watched_load(*args: Any) -> nn.Module:
        dense = load_model(*args)
        dense.__dict__["itself"] = dense
        loaded.extend(weakref.ref(parameter) for parameter in (dense, *dense.parameters()))
        return dense

    def watched_write(*args: Any) -> Any:
        assert loaded and not any(reference() is not None for reference in loaded)
        return write(*args)

    monkeypatch.setattr(model, "load", watched_load)
    monkeypatch.setattr(pruning.compress, "compress", watched_write)
    monkeypatch.setattr(pruning, "peak_rss_bytes", lambda: 123_456_700_000)
    code, text, _ = run(capsys, "run", "magnitude", "--model", model_dir(), "--out", tmp_path / "out")
    assert code == 0 and "peak memory 123,456.7 MB" in text


def test_compress_of_a_model_transformers_cannot_make(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.magnitude_masks(model_dir(), NMPattern(2, 4)).save(tmp_path / "masks.safetensors")
    broken = shutil.copytree(model_dir(), tmp_path / "broken")
    for change in ({"model_type": "nobody"}, {"hidden_size": "wide"}, {"pad_token_id": -9999}):
        shutil.copy(model_dir() / "config.json", broken)
        edit_config(broken, lambda config, change=change: config.update(change))
        argv = ["compress", broken, tmp_path / "masks.safetensors", "--out", tmp_path / "o"]
        code, _, errors = run(capsys, *argv)
        assert code == 2 and "broken: transformers cannot load it: " in errors, change
    edit_config(broken, lambda config: config.update({"model_type": "vit", "pad_token_id": 0}))
    code, _, errors = run(capsys, *argv)
    assert code == 2 and "broken: LlamaForCausalLM is not supported: " in errors
