"""How blocks are wired: stages and writers.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskgen.core.pattern import NMPattern
from maskgen.hf.blocks import BlockCall, record
from maskgen.hf.planning import plan
from maskgen.sweep.asymmetric import paths_in
from maskgen.sweep.wiring import Wiring, Wirings
from tests import models
from tests.maskgen.blocks import Experts, Two
from tests.maskgen.sweeping import windows

CPU = torch.device("cpu")
X_BTD = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))


class Half(nn.Module):
    """h = x + first(x), and h + tanh(second(norm(h)))."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.first(x_BTD)
        return x_BTD + self.second(self.norm(x_BTD)).tanh()


class InPlace(Two):
    """Both layers read x, and the second's output takes in the first's, in place."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        first_BTD, second_BTD = self.first(x_BTD), self.second(x_BTD)
        second_BTD += first_BTD
        return x_BTD + second_BTD


def linears(block: nn.Module) -> list[str]:
    return [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]


def wiring(block: nn.Module) -> Wiring:
    return Wiring.of(block, linears(block), X_BTD, BlockCall((), {}), CPU)


@torch.no_grad()
def test_experts_of_one_kind_make_one_stage() -> None:
    """Layers that share an input are together, unreached experts among their kind; `fc1` and `fc2` are two kinds."""
    assert list(wiring(Experts()).stages) == [
        ["mix"],
        [f"experts.{expert}.{layer}" for expert in range(3) for layer in ("fc1", "gate")],
        [f"experts.{expert}.fc2" for expert in range(3)],
    ]


@torch.no_grad()
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("opt", ["self_attn.out_proj", "fc2"]),
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"]),
    ],
)
def test_the_writers_of_a_block_are_found(kind: str, ends: list[str], products: torch.dtype) -> None:
    """With and without a stream that both read at once (GPT-NeoX); in float32, whatever the products of the run."""
    model = models.build(kind)
    found, ids = plan(model, NMPattern(2, 4), ()), windows(2)
    recording = record(model, found.blocks, ids.split(1), products)
    block, paths = found.blocks[1], list(paths_in(found.blocks[1], found.targets[1]).values())
    wired = Wiring.of(block, paths, recording.hidden[0], recording.call(0, 1), CPU)
    assert list(wired.writers) == ends
    assert list(wired.stages[-1]) == ends[-1:]


@torch.no_grad()
def test_a_block_that_adds_something_else_has_no_writers() -> None:
    """Experts, or norms behind the layers: their inputs drift, but nobody is told what the stream lacks."""
    assert wiring(Experts()).writers == []


@torch.no_grad()
def test_the_first_writer_is_found_by_what_is_read_after_it() -> None:
    """A block whose second half adds what no single linear layer puts out, as experts do."""
    assert wiring(Half()).writers == ["first"]


@torch.no_grad()
def test_outputs_that_are_added_to_in_place_are_those_of_their_layer() -> None:
    assert wiring(InPlace()).writers == ["first", "second"]


@torch.no_grad()
def test_blocks_of_one_kind_are_run_once() -> None:
    """Blocks of other parts, or of which other layers are to be pruned, are of another kind."""
    found = Wirings()

    def ask(block: nn.Module, paths: list[str]) -> Wiring:
        return found.of(block, paths, X_BTD, BlockCall((), {}), CPU)

    first = ask(Two(), ["first", "second"])
    assert ask(Two(), ["first", "second"]) is first
    assert ask(Two(), ["second"]).stages == [["second"]]
    assert ask(Half(), ["first", "second"]).writers == ["first"]
    assert len(found.known) == 3
