"""What a model does not take of a checkpoint is found by watching it load. Whole starts are in test_starts.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from maskgen.core.errors import FormatError


def test_views_count_and_names_alone_do_not() -> None:
    from sparse_serve.plugin.loading import _Watch

    watch, target = _Watch(False), torch.zeros(2, 4)
    tensors = {name: torch.ones(4, 8) for name in ("copied", "sliced", "converted", "left")}
    with watch:
        for name, tensor in tensors.items():
            watch.add(name, tensor)
        target.copy_(tensors["copied"][:2, :4])
        target.add_(tensors["sliced"].narrow(0, 1, 2).t().t()[:, :4])
        tensors["converted"].bfloat16()
    assert watch.untouched == ["left"]


def test_a_part_counts_where_all_of_it_was_to_be_taken() -> None:
    from sparse_serve.plugin.loading import _Watch

    watch, target = _Watch(True), torch.zeros(4, 8)
    tensors = {name: torch.ones(4, 8) for name in ("copied", "halves", "half", "seen", "left")}
    with watch:
        for name, tensor in tensors.items():
            watch.add(name, tensor)
        target.copy_(tensors["copied"].t().t())
        for half in tensors["halves"].chunk(2, dim=1):
            target[:, :4].copy_(half)
        target[:2].copy_(tensors["half"].narrow(0, 0, 2))
        tensors["seen"].view(2, 16)
    assert (watch.untouched, watch.partly) == (["left"], ["half"])


def test_memory_that_is_used_again_is_not_taken_for_the_tensor_that_had_it() -> None:
    from sparse_serve.plugin.loading import _Watch

    watch = _Watch(True)
    with watch:
        for number in range(50):
            watch.add(f"left.{number}", torch.full((64,), float(number)))
            torch.zeros(64).add_(1.0)
    assert len(watch.untouched) == 50


@pytest.mark.parametrize(
    ("name", "tied", "is_refused"),
    [
        ("model.layers.0.self_attn.q_proj.bias", False, True),
        ("model.layers.0.mlp.norm.weight", False, True),
        ("model.layers.2.mlp.norm.weight", False, False),
        ("lm_head.weight", True, False),
        ("lm_head.weight", False, True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False, False),
        ("gpt_neox.layers.0.attention.bias", False, False),
        ("gpt_neox.layers.0.attention.masked_bias", False, False),
        ("model.layers.0.self_attn.o_proj.bias", False, True),
    ],
)
def test_what_may_be_left(name: str, tied: bool, is_refused: bool) -> None:
    from sparse_serve.plugin.loading import NO_PLACE, check_taken

    config = SimpleNamespace(num_hidden_layers=2, tie_word_embeddings=tied)
    if not is_refused:
        check_taken([name], config, f"dir: Tiny {NO_PLACE}")
        return
    with pytest.raises(FormatError, match=f"dir: Tiny has no place for the tensor '{name}'"):
        check_taken([name], config, f"dir: Tiny {NO_PLACE}")


def test_layers_that_vllm_leaves_out_on_purpose_are_no_places_that_lack() -> None:
    from vllm.model_executor.models.utils import StageMissingLayer

    from sparse_serve.plugin.loading import left_out

    model = torch.nn.Module()
    model.lm_head = StageMissingLayer("output", torch.nn.Linear(2, 2))
    model.experts = torch.nn.Linear(2, 2)
    assert "lm_head" in left_out(model) and "mtp" in left_out(model) and "experts" not in left_out(model)
    model.experts.use_ep = True
    assert "experts" in left_out(model)
