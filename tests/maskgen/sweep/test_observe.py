"""A block is run on every batch, its layers' inputs are counted once, and its outputs go on when they are to.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskgen.core.errors import ModelError, NumericalError
from maskgen.hf.blocks import BlockCall, Recording
from maskgen.methods.oneshot.wanda import Wanda
from maskgen.sweep.observe import advance, observe

CPU = torch.device("cpu")


class Block(nn.Module):
    """up(x) + gate(x) goes through down; `copies` says on which batch sizes `gate` is given a copy of x."""

    def __init__(self, copies: tuple[int, ...] = ()) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.copies = copies

    def forward(self, x_BTD: Tensor) -> tuple[Tensor]:
        own_BTD = x_BTD.clone() if x_BTD.shape[0] in self.copies else x_BTD
        return (self.down(self.up(x_BTD) * self.gate(own_BTD)),)


class Counting(Wanda):
    """Wanda, and how often it was shown an input."""

    def observe(self, stats: Any, x_TI: Tensor) -> Any:
        shown.append(tuple(x_TI.shape))
        return super().observe(stats, x_TI)


shown: list[tuple[int, ...]] = []


def recording() -> Recording:
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(size, 5, 8, generator=generator) for size in (3, 3, 2)]
    return Recording(hidden, {size: [BlockCall((), {})] for size in (3, 2)})


def linears(block: Block) -> dict[str, nn.Linear]:
    return {"up": block.up, "gate": block.gate, "down": block.down}


@torch.no_grad()
def test_layers_of_one_input_share_what_is_summed_over_all_batches() -> None:
    block, batches = Block(), recording()
    before = [hidden_BTD.clone() for hidden_BTD in batches.hidden]
    shown.clear()
    inputs = observe(Counting(), linears(block), block, 0, batches, CPU)
    assert shown == [(15, 8), (15, 16), (15, 8), (15, 16), (10, 8), (10, 16)]
    up, gate = inputs.take("up"), inputs.take("gate")
    assert up is gate
    torch.testing.assert_close(up, torch.cat([one.flatten(0, 1) for one in before]).square().sum(0))
    assert inputs.take("down").shape == (16,)
    with pytest.raises(NumericalError, match="up: no calibration input"):
        inputs.take("up")
    assert all(map(torch.equal, batches.hidden, before))
    assert not any(layer._forward_pre_hooks for layer in linears(block).values())


@pytest.mark.parametrize("observed", [True, False])
@torch.no_grad()
def test_outputs_take_the_place_of_inputs(observed: bool) -> None:
    block, batches = Block(), recording()
    expected = [block(hidden_BTD)[0] for hidden_BTD in batches.hidden]
    if observed:
        observe(Wanda(), linears(block), block, 0, batches, CPU, keep_outputs=True)
    else:
        advance(block, 0, batches, CPU)
    assert all(map(torch.equal, batches.hidden, expected))


@torch.no_grad()
def test_a_block_that_shares_inputs_in_some_batches_only_is_an_error_and_is_left_as_it_was() -> None:
    block = Block(copies=(2,))
    with pytest.raises(ModelError, match="gate: shares its input with up in one batch and with gate in another"):
        observe(Wanda(), linears(block), block, 0, recording(), CPU)
    assert not any(layer._forward_pre_hooks for layer in linears(block).values())
    always = Block(copies=(2, 3))
    inputs = observe(Wanda(), linears(always), always, 0, recording(), CPU)
    up, gate = inputs.take("up"), inputs.take("gate")
    assert up is not gate and torch.equal(up, gate)


@torch.no_grad()
def test_outputs_that_overflow_are_named_where_they_are_kept() -> None:
    block = Block()
    block.down.weight.fill_(1e38)
    observe(Wanda(), linears(block), block, 0, recording(), CPU)
    with pytest.raises(NumericalError, match="output of block 0: NaN or infinity"):
        advance(block, 0, recording(), CPU)
