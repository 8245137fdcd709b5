"""Names in the files against names in memory, under transformers' own conversions."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from maskgen.hf.stored import Renamed, numbers_as_stars, shapes_of, tensor_names
from tests import models
from tests.families import FAMILIES

VISION = FAMILIES["gemma3_vision"]


def test_a_renamed_decoder() -> None:
    with torch.device("meta"):
        model = VISION.make(VISION.config())
    tail = "layers.0.self_attn.q_proj.weight"
    assert tensor_names(model, [f"language_model.model.{tail}"]) == {
        f"language_model.model.{tail}": Renamed((f"model.language_model.{tail}",), True)
    }


def test_experts_become_one_tensor() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["mixtral"].config())
    block = "model.layers.0"
    names = tensor_names(model, [f"{block}.block_sparse_moe.experts.3.w1.weight", f"{block}.self_attn.q_proj.weight"])
    assert names == {
        f"{block}.block_sparse_moe.experts.3.w1.weight": Renamed((f"{block}.mlp.experts.gate_up_proj",), False),
        f"{block}.self_attn.q_proj.weight": Renamed((f"{block}.self_attn.q_proj.weight",), True),
    }


def test_shapes_of_a_model_that_was_not_read() -> None:
    model = models.build("llama")
    assert shapes_of(model)["model.layers.0.mlp.up_proj.weight"] == (96, 64)


@pytest.mark.parametrize(
    ("name", "starred"),
    [("mlp.experts.3.w1", "mlp.experts.*.w1"), ("h.0.c2.10", "h.*.c2.*"), ("conv1d.weight", "conv1d.weight")],
)
def test_numbers(name: str, starred: str) -> None:
    assert numbers_as_stars(name) == starred
