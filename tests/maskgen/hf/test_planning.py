"""Which layers of a decoder are pruned, and why the others stay dense."""

from __future__ import annotations

import pytest
from torch import nn

from maskgen.core.errors import ModelError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.hf import layers, planning
from maskgen.hf.dense import OUTSIDE
from tests import models

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
