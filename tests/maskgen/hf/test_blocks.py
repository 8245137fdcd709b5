"""Block recording on hand-made models: whatever a model passes to its blocks is passed on; what cannot be is refused.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskgen.core.errors import ModelError, NumericalError
from maskgen.hf import blocks

CPU = torch.device("cpu")


class Block(nn.Module):
    """Scales by its own argument; may return a tuple, as older architectures do."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, scale: Tensor, *, bias: dict[str, Any]) -> Any:
        hidden = self.linear(hidden_states) * scale + bias["value"][0]
        return (hidden, "attention") if self.as_tuple else hidden


class Decoder(nn.Module):
    """`blocks` with per-layer arguments; `by_token` derives one from the input, `by_name` passes hidden by keyword."""

    def __init__(
        self, as_tuple: bool = False, by_token: bool = False, by_name: bool = False, skip: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block(as_tuple) for _ in range(3))
        self.as_tuple, self.by_token, self.by_name, self.skip = as_tuple, by_token, by_name, skip
        self.ran_head = False

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        hidden = self.embed(input_ids)
        for index, block in enumerate(self.blocks[: 1 if self.skip else None]):
            scale = torch.full((1, input_ids.shape[1], 1), float(index + 1), dtype=hidden.dtype)
            if self.by_token:
                scale = scale * input_ids.amax()
            bias = {"value": (torch.tensor(0.5, dtype=hidden.dtype), torch.arange(3), None)}
            output = (
                block(hidden_states=hidden, scale=scale, bias=bias) if self.by_name else block(hidden, scale, bias=bias)
            )
            hidden = output[0] if self.as_tuple else output
        self.ran_head = True
        return hidden


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(16, (7, 5), generator=generator).split(3))


@torch.no_grad()
def run_all(model: Decoder, recording: blocks.Recording) -> list[Tensor]:
    hidden = list(recording.hidden)
    for index, block in enumerate(model.blocks):
        with blocks.upcast(block, CPU):
            hidden = [
                blocks.run(block, hidden_BTD, recording.call(batch, index), CPU)
                for batch, hidden_BTD in enumerate(hidden)
            ]
    return hidden


@pytest.mark.parametrize("options", [{}, {"as_tuple": True}, {"by_name": True}, {"as_tuple": True, "by_name": True}])
@torch.no_grad()
def test_block_by_block_equals_the_whole_model(options: dict[str, bool]) -> None:
    model = Decoder(**options)
    recording = blocks.record(model, model.blocks, batches())
    assert not model.ran_head
    assert sorted(recording.calls) == [1, 3]
    results = run_all(model, recording)
    for ids_BT, hidden_BTD in zip(batches(), results, strict=True):
        assert torch.equal(hidden_BTD, model(ids_BT, use_cache=False))


@torch.no_grad()
def test_half_precision_is_run_in_float32_and_restored() -> None:
    model = Decoder().to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recording = blocks.record(model, model.blocks, batches())
    assert {hidden.dtype for hidden in recording.hidden} == {torch.float32}
    results = run_all(model, recording)
    assert {result.dtype for result in results} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])
    exact = model.float()
    torch.testing.assert_close(results[0], exact(batches()[0], use_cache=False))


def test_forward_methods_come_back_even_after_an_error() -> None:
    model = Decoder(by_token=True)
    with pytest.raises(ModelError, match="Decoder: block 0 receives an argument that depends on the tokens"):
        blocks.record(model, model.blocks, [torch.tensor([[1, 2]]), torch.tensor([[3, 4]])])
    assert all("forward" not in block.__dict__ for block in model.blocks)
    mine: Callable[..., Any] = model.blocks[0].forward
    model.blocks[0].forward = mine
    blocks.record(model, model.blocks, [torch.tensor([[1, 2]])])
    assert model.blocks[0].__dict__["forward"] is mine


def test_ctrl_c_while_forward_methods_are_replaced_is_not_lost() -> None:
    class Stops(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "forward":
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    first, second = nn.Linear(1, 1), Stops(1, 1)
    with pytest.raises(KeyboardInterrupt), blocks.replaced_forward([first, second], lambda: None):
        pytest.fail("the second block was replaced")
    assert "forward" not in first.__dict__ | second.__dict__


def test_a_model_that_skips_blocks_is_refused() -> None:
    model = Decoder(skip=True)
    with pytest.raises(ModelError, match="does not run every decoder block once"):
        blocks.record(model, model.blocks, batches())


@torch.no_grad()
def test_bad_embeddings_are_named() -> None:
    model = Decoder()
    model.embed.weight[batches()[0][0, 0]] = float("nan")
    with pytest.raises(NumericalError, match="the embeddings: NaN or infinity"):
        blocks.record(model, model.blocks, batches())
