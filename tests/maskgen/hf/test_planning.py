"""Which layers of a decoder are pruned, and why the others stay dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from maskgen.core.errors import ModelError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf import layers, planning, servable
from maskgen.hf.dense import EXPERTS, NOT_SERVED, OUTSIDE
from maskgen.hf.model import load
from maskgen.hf.servable import Table
from tests import models
from tests.families import FAMILIES

TWO_FOUR = NMPattern(2, 4)
PER_BLOCK = {"opt": 6, "gpt_neox": 4}


@pytest.mark.parametrize("kind", models.BUILDERS)
def test_every_linear_is_a_target_or_ignored_with_a_reason(kind: str) -> None:
    built = models.build(kind)
    plan = planning.plan(built, TWO_FOUR)
    assert [len(targets) for targets in plan.targets] == [PER_BLOCK.get(kind, 7)] * models.LAYERS
    named = {name for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    targets = {name: linear for block in plan.targets for name, linear in block.items()}
    assert set(targets) | set(plan.ignored) == named and not set(targets) & set(plan.ignored)
    assert plan.ignored == {"lm_head": OUTSIDE}
    for name, linear in targets.items():
        assert built.get_submodule(name) is linear
    for block, inside in zip(plan.blocks, plan.targets, strict=True):
        assert {id(linear) for linear in inside.values()} <= {id(module) for module in block.modules()}


@pytest.mark.parametrize("ignore", ["*.q_proj", "model.layers.1.mlp.gate_proj"])
def test_half_of_a_fused_layer_is_refused_before_any_work(ignore: str) -> None:
    with pytest.raises(RecipeError, match=r"engines serve .* as one layer; ignore all of them or none"):
        planning.plan(models.build("llama"), NMPattern(2, 4), [ignore])


def test_ignore_patterns_keep_layers_dense() -> None:
    plan = planning.plan(models.build("llama"), TWO_FOUR, ["*.down_proj", "model.layers.1.*"])
    assert [len(targets) for targets in plan.targets] == [6, 0, 6]
    assert plan.ignored["model.layers.0.mlp.down_proj"] == "ignored by '*.down_proj'"
    with pytest.raises(RecipeError, match=r"'\*\.fc9': matches no linear layer"):
        planning.plan(models.build("llama"), TWO_FOUR, ["*.fc9"])


def test_layers_the_pattern_does_not_fit_stay_dense() -> None:
    plan = planning.plan(models.build("llama", intermediate_size=100), TWO_FOUR)
    assert plan.ignored["model.layers.2.mlp.down_proj"] == "in_features 100 is not a multiple of 8"
    assert len(plan.targets[2]) == 6
    with pytest.raises(ModelError, match="nothing to prune with pattern 5:7"):
        planning.plan(models.build("llama"), NMPattern(5, 7))


def test_a_model_without_blocks_is_refused() -> None:
    built = models.build("llama")
    built.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"expected one ModuleList of 5 decoder blocks .*found none"):
        layers.decoder_blocks(built)
    built.config.num_hidden_layers = models.LAYERS
    built.twin = nn.ModuleList(nn.Linear(8, 8) for _ in range(models.LAYERS))
    with pytest.raises(ModelError, match=r"found \['model\.layers', 'twin'\]"):
        layers.decoder_blocks(built)


def test_lists_inside_blocks_are_not_mistaken_for_the_blocks() -> None:
    built = models.build("llama")
    for block in built.model.layers:
        block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(models.LAYERS))
    name, blocks = layers.decoder_blocks(built)
    assert name == "model.layers" and len(blocks) == models.LAYERS


def serve(monkeypatch: pytest.MonkeyPatch, entry: Any) -> None:
    """Pretend that this is all vLLM has."""
    table = Table.from_dict({"vllm": "1.2.3", "architectures": {"LlamaForCausalLM": entry}})
    monkeypatch.setattr(servable, "table", lambda: table)


def test_what_vllm_does_not_serve_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"fused": {}, "sparse": ["mlp.up_proj", "self_attn.q_proj"], "dense": ["self_attn.o_proj"]})
    plan = planning.plan(models.build("llama"), TWO_FOUR)
    assert plan.is_checked and plan.architecture == "LlamaForCausalLM"
    assert [len(targets) for targets in plan.targets] == [2] * models.LAYERS
    assert {plan.ignored[f"model.layers.0.{name}"] for name in ("self_attn.o_proj", "mlp.gate_proj")} == {NOT_SERVED}
    serve(monkeypatch, {"fused": {}, "sparse": [], "dense": []})
    with pytest.raises(ModelError, match=f"nothing to prune with pattern 2:4: all 21 .*: {NOT_SERVED}"):
        planning.plan(models.build("llama"), TWO_FOUR)


def test_fused_layers_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name.partition("layers.0.")[2] for name in planning.plan(models.build("llama"), TWO_FOUR).targets[0]]
    serve(monkeypatch, {"fused": {"all": ["o_proj", "q_proj"]}, "sparse": names, "dense": []})
    planning.plan(models.build("llama"), TWO_FOUR, ["*.k_proj"])
    with pytest.raises(RecipeError, match=r"o_proj dense and .*q_proj sparse, but engines serve o_proj and q_proj as"):
        planning.plan(models.build("llama"), TWO_FOUR, ["*.o_proj"])
    serve(monkeypatch, None)
    assert not planning.plan(models.build("llama"), TWO_FOUR).is_checked
    with pytest.raises(RecipeError, match=r"engines serve q_proj and k_proj and v_proj as one layer"):
        planning.plan(models.build("llama"), TWO_FOUR, ["*.k_proj"])


def test_names_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    dense = FAMILIES["gemma3_vision"].save(tmp_path / "dense")
    outline, loaded = planning.plan_of(dense, TWO_FOUR), planning.plan_of(dense, TWO_FOUR, (), load(dense))
    assert (outline.ignored, outline.listed, outline.kept) == (loaded.ignored, loaded.listed, loaded.kept)
    assert [list(block) for block in outline.targets] == [list(block) for block in loaded.targets]
    name = "language_model.model.layers.1.mlp.up_proj"
    assert outline.targets[1][name].weight.is_meta and not loaded.targets[1][name].weight.is_meta
    assert outline.stored["model.language_model.layers.1.mlp.up_proj.weight"] == f"{name}.weight"
    tower = "vision_tower.encoder.layers.1.self_attn.q_proj"
    assert outline.ignored[tower] == OUTSIDE and tower in outline.listed
    masked = {layer for block in outline.targets for layer in block}
    assert set(planning.dense_names(dense, masked)) == set(outline.listed)


def test_experts_are_one_entry_and_not_in_the_manifest(tmp_path: Path) -> None:
    dense = FAMILIES["mixtral"].save(tmp_path / "dense")
    plan = planning.plan_of(dense, TWO_FOUR)
    assert plan.ignored["model.layers.1.block_sparse_moe.experts"] == EXPERTS
    gates = [f"model.layers.{number}.block_sparse_moe.gate" for number in range(2)]
    assert sorted(plan.listed) == ["lm_head", *gates]
    masked = {layer for block in plan.targets for layer in block}
    assert set(planning.dense_names(dense, masked)) == set(plan.listed)
