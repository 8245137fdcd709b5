"""How a decoder block is wired: which of its layers are reached together, and which add to the residual stream.

It is found by running the block once, and is the same for all blocks of its kind.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskgen.hf import blocks
from maskgen.sweep.observe import cloning, hooked, putting_out, receiving

_ROUNDING = 1e-5
"""Most of a block's output, by L2 norm, that its input and its writers may leave unexplained."""

_ANY = "#"
"""Stands for the number of an expert."""


@dataclass(frozen=True)
class Wiring:
    """Paths of layers in their block: `stages` are the ones to be pruned, in the order in which they are reached,
    layers that are reached together in one stage; `writers` those that add to the residual stream, in their order."""

    stages: Sequence[Sequence[str]]
    writers: Sequence[str]

    @classmethod
    def of(
        cls, block: nn.Module, paths: Sequence[str], hidden_BTD: Tensor, call: blocks.BlockCall, device: torch.device
    ) -> Wiring:
        """Of a float32 block on `device`, found by running it on one batch; `paths` are the layers to be pruned.

        Experts that the batch does not reach are with the others of their kind, other such layers at the end.
        """
        reached: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        layers = {path: linears[path] for path in paths}
        with (
            receiving(layers, reached.setdefault),
            putting_out(linears, cloning(outputs)),
            _reading(block, hidden_BTD) as read,
        ):
            whole_BTD = blocks.forward(block, hidden_BTD, call, device, blocks.COMPUTE_DTYPE)
        return cls(_stages(paths, reached), _writers(hidden_BTD.to(device), whole_BTD, outputs, read))


@dataclass
class Wirings:
    """The wiring of each kind of block in a model, found where one of that kind is first asked for."""

    known: dict[tuple[object, ...], Wiring] = field(default_factory=dict)

    def of(
        self, block: nn.Module, paths: Sequence[str], hidden_BTD: Tensor, call: blocks.BlockCall, device: torch.device
    ) -> Wiring:
        """As `Wiring.of`, which runs only for the first block of a kind."""
        kind = _kind_of_block(block, paths)
        if kind not in self.known:
            self.known[kind] = Wiring.of(block, paths, hidden_BTD, call, device)
        return self.known[kind]


def _kind_of_block(block: nn.Module, paths: Sequence[str]) -> tuple[object, ...]:
    """What blocks of one wiring have in common: names, classes and shapes of their parts, and what is to be pruned."""
    parts = [(path, type(module).__qualname__) for path, module in block.named_modules()]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
    return (*parts, *shapes, *paths)


def is_expert(path: str) -> bool:
    """Whether a layer is one expert's of a mixture."""
    return _ANY in _kind(path)


def _stages(paths: Sequence[str], reached: dict[str, Tensor]) -> list[list[str]]:
    stage_of: dict[str, str] = {}
    for path, x in reached.items():
        leader = next(other for other, seen in reached.items() if seen is x)
        stage_of.setdefault(_kind(path), stage_of.get(_kind(leader), _kind(leader)))
    order = [*dict.fromkeys(stage_of.values()), ""]
    stages = [[path for path in paths if stage_of.get(_kind(path), "") == stage] for stage in order]
    return [stage for stage in stages if stage]


def _writers(start_BTD: Tensor, whole_BTD: Tensor, outputs: dict[str, Tensor], read: Sequence[Tensor]) -> list[str]:
    """The linear layers whose outputs are added to the residual stream, by their path in the block, in order.

    They are the one or two that make the block's output `whole_BTD` when they are added to its input. Where no two do
    (the second half are experts), it is the one that makes what some other layer of the block, a norm, reads. None for
    blocks that are made in another way, with norms behind their layers for instance.
    """
    added = {path: y.reshape(start_BTD.shape) for path, y in outputs.items() if _fits(y, start_BTD)}

    def make(paths: Sequence[str], reached_BTD: Tensor) -> bool:
        rest_BTD = reached_BTD - start_BTD - sum(added[path] for path in paths)
        return float(rest_BTD.norm()) <= _ROUNDING * float(reached_BTD.norm() + start_BTD.norm())

    pairs = [*itertools.combinations(added, 1), *itertools.combinations(added, 2)]
    found = next((paths for paths in pairs if make(paths, whole_BTD)), None)
    if found is None:
        found = next(((path,) for path in added if any(make((path,), x_BTD) for x_BTD in read)), ())
    return list(found)


@contextlib.contextmanager
def _reading(block: nn.Module, hidden_BTD: Tensor) -> Iterator[list[Tensor]]:
    """What norms and the like of a block read while it runs, where that is as large as its input; filled meanwhile."""
    read: list[Tensor] = []

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dim() and _fits(x, hidden_BTD):
            read.append(x.clone().reshape(hidden_BTD.shape))

    leaves = [module for module in block.modules() if not list(module.children()) and not isinstance(module, nn.Linear)]
    with hooked([leaf.register_forward_pre_hook(before) for leaf in leaves]):
        yield read


def _fits(y: Tensor, hidden_BTD: Tensor) -> bool:
    """Whether `y` is of the same tokens and as wide; some blocks put all tokens in one row of them."""
    return y.shape[-1] == hidden_BTD.shape[-1] and y.numel() == hidden_BTD.numel()


def _kind(name: str) -> str:
    """The name without the number of an expert: what all of them call this layer."""
    return re.sub(r"(?<=\bexperts\.)\d+(?=\.)", _ANY, name)
