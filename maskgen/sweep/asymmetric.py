"""Solving a block stage by stage beside the dense block, for methods with `is_asymmetric`.

    stage 1 of a Llama block   q, k, v        a stage: layers that are reached together
    stage 2                    o              each is observed when all before it are pruned
    stage 3                    gate, up
    stage 4                    down

Both blocks run on the same windows: the one at work on what the pruned blocks before it put out, a dense copy of it on
what the dense model has there. A run ends when it has reached the last layer of the stage. Experts of a mixture make
one stage by their kind, since no expert comes before another.

The writers of a block are the layers whose outputs are added to the residual stream: each is told what the stream in
front of it lacks, hidden + outputs of the writers before it, dense minus pruned.

Legend: B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskgen.hf import blocks
from maskgen.methods import Drift, LayerMethod
from maskgen.sweep.observe import InputStatistics, cloning, putting_out, receiving
from maskgen.sweep.reconstruct import Teacher
from maskgen.sweep.wiring import Wiring, is_expert


class _StageReached(Exception):
    """Ends the run of a block when all layers of a stage have received their input."""


@dataclass(frozen=True)
class BesideDense:
    """The float32 block at work, number `index`, dense as yet, and a copy of it that stays dense.

    `paths` say where in the block a layer is, by name, `stages` which ones to solve together, by name and in order, and
    `writers` which ones add to the residual stream, in their order.
    """

    method: LayerMethod
    block: nn.Module
    dense: nn.Module
    index: int
    paths: Mapping[str, str]
    stages: Sequence[Sequence[str]]
    writers: Sequence[str]
    recording: blocks.Recording
    teacher: Teacher
    device: torch.device

    @classmethod
    def of(
        cls,
        method: LayerMethod,
        block: nn.Module,
        index: int,
        layers: Mapping[str, nn.Linear],
        wiring: Wiring,
        recording: blocks.Recording,
        teacher: Teacher,
        device: torch.device,
    ) -> BesideDense:
        """Of a block whose layers to be pruned are `layers`, by name. The copy of it takes as much memory again."""
        paths = paths_in(block, layers)
        names = {path: name for name, path in paths.items()}
        stages = [[names[path] for path in stage] for stage in wiring.stages]
        writers = [names.get(path, path) for path in wiring.writers]  # one that is not pruned goes by its path
        paths |= {name: name for name in writers if name not in paths}
        return cls(method, block, copy.deepcopy(block), index, paths, stages, writers, recording, teacher, device)

    def observe(self, names: Sequence[str], keep_outputs: bool = False) -> InputStatistics:
        """Statistics of the inputs of these layers, which make one stage, in the block as it is now.

        With `keep_outputs`, the dense block is run to its end, and what it puts out is given to the teacher.
        """
        statistics = InputStatistics(self.method, self.recording.call(0, self.index).products)
        for batch, hidden_BTD in enumerate(self.recording.hidden):
            dense_BTD = self.teacher.hidden[batch]
            wanted, wanted_out = self._reach(self.dense, names, batch, dense_BTD, keep_outputs)
            found, found_out = self._reach(self.block, names, batch, hidden_BTD)
            for name, x in found.items():
                missing_BTD = None
                if name in self.writers and sum(other is x for other in found.values()) == 1:
                    missing_BTD = (dense_BTD - hidden_BTD).to(self.device)
                    for writer in self.writers[: self.writers.index(name)]:
                        missing_BTD += (wanted_out[writer].float() - found_out[writer].float()).reshape(
                            missing_BTD.shape
                        )
                tokens = hidden_BTD.shape[0] * hidden_BTD.shape[1]
                dense = None if is_expert(name) else wanted.get(name)  # experts order their tokens as they like
                statistics.add(name, x, _drift(x, dense, missing_BTD, tokens))
            statistics.end_of_batch()
        return statistics

    def _reach(
        self, block: nn.Module, names: Collection[str], batch: int, hidden_BTD: Tensor, keep_output: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run `block` on a batch until all layers of `names` have received an input, or to its end.

        Gives these inputs, and the outputs of writers that were there by then, by name. With `keep_output` the run goes
        to the end in any case, for the teacher.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def reach(name: str, x: Tensor) -> None:
            inputs[name] = x
            if len(inputs) == len(names) and not keep_output:
                raise _StageReached

        layers = {name: block.get_submodule(self.paths[name]) for name in names}
        writers = {name: block.get_submodule(self.paths[name]) for name in self.writers}
        with receiving(layers, reach), putting_out(writers, cloning(outputs)), contextlib.suppress(_StageReached):
            output_BTD = blocks.run(block, hidden_BTD, self.recording.call(batch, self.index), self.device)
            if keep_output:
                self.teacher.put(output_BTD, self.index)
        return inputs, outputs


def paths_in(block: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Where in `block` each of `layers` is, by name."""
    paths = {id(module): path for path, module in block.named_modules()}
    return {name: paths[id(layer)] for name, layer in layers.items()}


def _drift(x: Tensor, dense: Tensor | None, missing_BTD: Tensor | None, tokens: int) -> Drift | None:
    """How far the input `x` `[..., I]` is from that in the `dense` model, if both are of all `tokens` of a batch."""
    if dense is None or dense.shape != x.shape or x.numel() != tokens * x.shape[-1]:
        return None
    difference_TI = (dense.float() - x.float()).reshape(tokens, -1)
    return Drift(difference_TI, None if missing_BTD is None else missing_BTD.reshape(tokens, -1))
