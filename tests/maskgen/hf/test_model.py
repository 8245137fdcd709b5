"""Finding what to prune in any Hugging Face decoder, and loading strictly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from maskgen.core.errors import ModelError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf import model
from tests import models

TWO_FOUR = NMPattern(2, 4)
PER_BLOCK = {"opt": 6, "gpt_neox": 4}


@pytest.mark.parametrize("kind", models.BUILDERS)
def test_every_linear_is_a_target_or_ignored_with_a_reason(kind: str) -> None:
    built = models.build(kind)
    plan = model.plan(built, TWO_FOUR)
    assert [len(targets) for targets in plan.targets] == [PER_BLOCK.get(kind, 7)] * models.LAYERS
    named = {name for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    targets = {name: linear for block in plan.targets for name, linear in block.items()}
    assert set(targets) | set(plan.ignored) == named and not set(targets) & set(plan.ignored)
    assert plan.ignored == {"lm_head": model.OUTSIDE}
    for name, linear in targets.items():
        assert built.get_submodule(name) is linear
    for block, inside in zip(plan.blocks, plan.targets, strict=True):
        assert {id(linear) for linear in inside.values()} <= {id(module) for module in block.modules()}


@pytest.mark.parametrize("ignore", ["*.q_proj", "model.layers.1.mlp.gate_proj"])
def test_half_of_a_fused_layer_is_refused_before_any_work(ignore: str) -> None:
    with pytest.raises(RecipeError, match=r"engines serve .* as one layer; ignore all of them or none"):
        model.plan(models.build("llama"), NMPattern(2, 4), [ignore])


def test_ignore_patterns_keep_layers_dense() -> None:
    plan = model.plan(models.build("llama"), TWO_FOUR, ["*.down_proj", "model.layers.1.*"])
    assert [len(targets) for targets in plan.targets] == [6, 0, 6]
    assert plan.ignored["model.layers.0.mlp.down_proj"] == "ignored by '*.down_proj'"
    with pytest.raises(RecipeError, match=r"'\*\.fc9': matches no linear layer"):
        model.plan(models.build("llama"), TWO_FOUR, ["*.fc9"])


def test_layers_the_pattern_does_not_fit_stay_dense() -> None:
    plan = model.plan(models.build("llama", intermediate_size=100), TWO_FOUR)
    assert plan.ignored["model.layers.2.mlp.down_proj"] == "in_features 100 is not a multiple of 8"
    assert len(plan.targets[2]) == 6
    with pytest.raises(ModelError, match="nothing to prune with pattern 5:7"):
        model.plan(models.build("llama"), NMPattern(5, 7))


def test_gpt2_is_refused_by_name() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=1)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        model.plan(GPT2LMHeadModel(config), TWO_FOUR)


def test_a_model_without_blocks_is_refused() -> None:
    built = models.build("llama")
    built.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"expected one ModuleList of 5 decoder blocks .*found none"):
        model.decoder_blocks(built)
    built.config.num_hidden_layers = models.LAYERS
    built.twin = nn.ModuleList(nn.Linear(8, 8) for _ in range(models.LAYERS))
    with pytest.raises(ModelError, match=r"found \['model\.layers', 'twin'\]"):
        model.decoder_blocks(built)


def test_lists_inside_blocks_are_not_mistaken_for_the_blocks() -> None:
    built = models.build("llama")
    for block in built.model.layers:
        block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(models.LAYERS))
    name, blocks = model.decoder_blocks(built)
    assert name == "model.layers" and len(blocks) == models.LAYERS


def test_load_keeps_the_stored_dtype_unless_told(model_dir: Callable[..., Path]) -> None:
    path = model_dir("llama", dtype=torch.bfloat16)
    loaded = model.load(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {parameter.dtype for parameter in model.load(path, torch.float32).parameters()} == {torch.float32}
    assert model.max_tokens(loaded) == models.MAX_TOKENS


def test_linear_names_need_no_weights(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    path = model_dir("qwen2")
    shutil.copy(path / "config.json", tmp_path)
    expected = [name for name, module in model.load(path).named_modules() if isinstance(module, nn.Linear)]
    assert model.linear_names(tmp_path) == expected


def test_a_missing_weight_is_an_error_not_a_random_one(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir("llama"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        model.load(broken)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "transformers cannot load it"),
        (lambda path: (path / "config.json").unlink(), "transformers cannot load it"),
        (lambda path: (path / "config.json").write_text('{"model_type": "nobody"}'), "transformers cannot load it"),
        (
            lambda path: (path / "config.json").write_text(
                json.dumps(
                    {**json.loads((path / "config.json").read_text()), "quantization_config": {"quant_method": "fp8"}}
                )
            ),
            "already quantized",
        ),
    ],
)
def test_damaged_directories(
    model_dir: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    broken = shutil.copytree(model_dir("llama"), tmp_path / "broken")
    damage(broken)
    with pytest.raises(ModelError, match=message) as caught:
        model.load(broken)
    assert "\n" not in str(caught.value)


def test_a_directory_without_tokenizer(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(model_dir("llama") / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        model.load_tokenizer(tmp_path)


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "a/b/c", "org/not-downloaded"])
def test_resolve_refuses_what_is_not_there(source: str) -> None:
    with pytest.raises(ModelError, match=source) as caught:
        model.resolve(source)
    assert "\n" not in str(caught.value)


def test_resolve_takes_directories_as_they_are(tmp_path: Path) -> None:
    assert model.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="not a directory"):
        model.resolve(str(tmp_path / "file"))
