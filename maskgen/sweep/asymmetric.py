"""Solving a block stage by stage beside the dense block, for methods with `is_asymmetric`.

    stage 1 of a Llama block   q, k, v        a stage: layers that are reached together
    stage 2                    o              each is observed when all before it are pruned
    stage 3                    gate, up
    stage 4                    down

Both blocks run on the same windows: the one at work on what the pruned blocks before it put out, a dense copy of it on
what the dense model has there. A run ends when it has reached the last layer of the stage. Experts of a mixture make
one stage by their kind, since no expert comes before another.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskgen.hf import blocks
from maskgen.methods import LocalMethod
from maskgen.sweep.observe import InputStatistics, Receives, receiving
from maskgen.sweep.reconstruct import Teacher


class _StageReached(Exception):
    """Ends the run of a block when all layers of a stage have received their input."""


@dataclass(frozen=True)
class BesideDense:
    """The float32 block at work, number `index`, with its `layers` by name, and the dense block beside it."""

    method: LocalMethod
    block: nn.Module
    dense: nn.Module
    index: int
    layers: Mapping[str, nn.Linear]
    recording: blocks.Recording
    teacher: Teacher
    device: torch.device

    @classmethod
    def of(
        cls,
        method: LocalMethod,
        block: nn.Module,
        index: int,
        layers: Mapping[str, nn.Linear],
        recording: blocks.Recording,
        teacher: Teacher,
        device: torch.device,
    ) -> BesideDense:
        """Of a block that is dense as yet. The copy of it takes as much memory again."""
        return cls(method, block, copy.deepcopy(block), index, layers, recording, teacher, device)

    def stages(self) -> list[list[str]]:
        """Names of the layers of each stage, in the order in which the first batch reaches them.

        Layers that it does not reach, nor any of their kind, come last.
        """
        reached: dict[str, Tensor] = {}
        with receiving(self.layers, reached.setdefault):
            blocks.run(self.block, self.recording.hidden[0], self.recording.call(0, self.index), self.device)
        stage_of: dict[str, str] = {}
        for name, x in reached.items():
            leader = next(other for other, seen in reached.items() if seen is x)
            stage_of.setdefault(_kind(name), stage_of.get(_kind(leader), _kind(leader)))
        order = [*dict.fromkeys(stage_of.values()), ""]
        names = [[name for name in self.layers if stage_of.get(_kind(name), "") == stage] for stage in order]
        return [stage for stage in names if stage]

    def observe(self, names: Sequence[str]) -> InputStatistics:
        """Statistics of the inputs of these layers, which make one stage, in the block as it is now."""
        statistics = InputStatistics(self.method)
        own = {name: self.layers[name] for name in names}
        modules = {id(module): path for path, module in self.block.named_modules()}
        dense = {name: self.dense.get_submodule(modules[id(layer)]) for name, layer in own.items()}
        for batch, hidden_BTD in enumerate(self.recording.hidden):
            beside: dict[str, Tensor] = {}
            self._reach(self.dense, dense, batch, self.teacher.hidden[batch], beside.__setitem__)
            statistics.begin_batch(beside, hidden_BTD.shape[0] * hidden_BTD.shape[1])
            self._reach(self.block, own, batch, hidden_BTD, statistics.add)
            statistics.end_of_batch()
        return statistics

    def _reach(
        self, block: nn.Module, layers: Mapping[str, nn.Module], batch: int, hidden_BTD: Tensor, receives: Receives
    ) -> None:
        """Run `block` on a batch until all of `layers` have received an input, or to its end."""
        missing = set(layers)

        def reach(name: str, x: Tensor) -> None:
            receives(name, x)
            missing.discard(name)
            if not missing:
                raise _StageReached

        with receiving(layers, reach), contextlib.suppress(_StageReached):
            blocks.run(block, hidden_BTD, self.recording.call(batch, self.index), self.device)


def _kind(name: str) -> str:
    """The name without the numbers of its modules: what all experts call this layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
