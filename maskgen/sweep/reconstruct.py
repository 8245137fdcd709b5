"""Training a pruned block until it puts out what the dense one does: the part of `BlockMethod` that runs the block.

    dense windows  -> [dense block i]  -> wanted outputs                  one pass, before the block is pruned
    pruned windows -> [pruned block i] -> outputs, loss, step             `epochs` passes, batches in a new order each
                   -> [rounded block i]                                   kept only if its loss is lower than before

Everything random comes from the recipe's seed and the number of the block, so a block that is trained again after a
kill comes out with the same bits (on a CPU).

Legend: B = batch, T = tokens, D = hidden size, O = out features, I = in features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.core.digest import derive_seed
from maskgen.core.errors import NumericalError
from maskgen.hf import blocks
from maskgen.methods.blockwise import BlockMethod

RECONSTRUCTION_FILE = "maskgen_reconstruction.json"
"""What training each block gained, written beside the weights."""


@dataclass(frozen=True)
class Fitted:
    """The loss of a block before it was trained and after, over all calibration windows, weights rounded as stored.

    `after` is never more than `before`: training that did not help is undone.
    """

    before: float
    after: float


def report(fitted: Mapping[int, Fitted]) -> dict[str, Any]:
    """Files to write beside the weights, by name: the losses of the blocks that were trained, if any was."""
    blocks_of = [{"block": index, **asdict(fitted[index])} for index in sorted(fitted)]
    return {RECONSTRUCTION_FILE: {"blocks": blocks_of}} if blocks_of else {}


@dataclass
class Teacher:
    """What the dense model puts out: `hidden` holds its activations in front of the block that comes next.

    `wanted` are the outputs of the dense block at work, one `[B, T, D]` for each batch.
    """

    hidden: list[Tensor]
    wanted: list[Tensor]

    @classmethod
    def of(cls, recording: blocks.Recording) -> Teacher:
        """Of a recording of the first block's inputs, which dense and pruned model have in common."""
        return cls(list(recording.hidden), [])

    def run(self, block: nn.Module, index: int, recording: blocks.Recording, device: torch.device) -> None:
        """Run the float32 block number `index`, dense as yet. Raises `NumericalError` for outputs that are not
        finite."""
        for batch, hidden_BTD in enumerate(self.hidden):
            self.put(blocks.run(block, hidden_BTD, recording.call(batch, index), device), index)

    def put(self, output_BTD: Tensor, index: int) -> None:
        """The output of dense block number `index` for the next batch. Raises `NumericalError` if it is not finite."""
        blocks.check_finite(output_BTD, f"output of dense block {index}")
        self.wanted.append(output_BTD)

    def advance(self) -> None:
        """The outputs of this block are the inputs of the next one."""
        self.hidden, self.wanted = self.wanted, []


@dataclass(frozen=True)
class Training:
    """One block at work: `layers` are its pruned layers and `masks` their masks, by name; `dtypes` those they are
    stored in."""

    method: BlockMethod
    block: nn.Module
    index: int
    layers: Mapping[str, nn.Linear]
    masks: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    recording: blocks.Recording
    teacher: Teacher
    device: torch.device

    def run(self, seed: int, tell: Callable[[str], None]) -> Fitted:
        """Train the weights of `layers`, in place; they end up rounded to what is stored.

        The outputs of the block take the place of its inputs in `recording.hidden`, as `observe.advance` does it.
        `tell` is called with what there is to say after each epoch. Raises `NumericalError` naming the block.
        """
        before = self._loss(lambda batch, output_BTD: None)
        start = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        weights = [layer.weight for layer in self.layers.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            self._train(weights, derive_seed(seed, self.index), tell)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None
        for name, layer in self.layers.items():
            layer.weight.data = layer.weight.data.to(self.dtypes[name]).to(blocks.COMPUTE_DTYPE)
        outputs: dict[int, Tensor] = {}
        after = self._loss(outputs.__setitem__)
        if not after <= before:
            for name, layer in self.layers.items():
                layer.weight.data = start[name]
            after = self._loss(outputs.__setitem__)
        self.recording.hidden[:] = [outputs[batch] for batch in range(len(outputs))]
        return Fitted(before, after)

    def _train(self, weights: Sequence[Tensor], seed: int, tell: Callable[[str], None]) -> None:
        method, batches = self.method, len(self.recording.hidden)
        fit = method.fit(weights, [mask.to(self.device) for mask in self.masks.values()], method.epochs * batches)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(method.epochs):
            total = 0.0
            for batch in torch.randperm(batches, generator=generator).tolist():
                inputs_BTD = self._inputs(batch, epoch)
                with torch.enable_grad():
                    output_BTD = self._run(batch, inputs_BTD, method.compute_dtype)
                    total += fit.step(output_BTD, self.teacher.wanted[batch].to(self.device))
                if not math.isfinite(total):
                    raise NumericalError(
                        f"block {self.index}: the loss of its reconstruction is {total} in epoch {epoch + 1}; lower "
                        "method.lr, or compute with method.dtype=float32"
                    )
            tell(f"reconstruction, epoch {epoch + 1} of {method.epochs}, loss {total / batches:.4g}")

    def _inputs(self, batch: int, epoch: int) -> Tensor:
        """What the block reads of a batch; mixed inputs are each kind in every other epoch."""
        dense = self.method.inputs == "dense" or (self.method.inputs == "mixed" and (batch + epoch) % 2 == 1)
        return (self.teacher if dense else self.recording).hidden[batch]

    def _run(self, batch: int, inputs_BTD: Tensor, products: torch.dtype | None = None) -> Tensor:
        return blocks.forward(self.block, inputs_BTD, self.recording.call(batch, self.index), self.device, products)

    def _loss(self, keep: Callable[[int, Tensor], None]) -> float:
        """Mean over all batches, of what the pruned model really reads; `keep` gets number and output of each, on the
        CPU. Raises `NumericalError` for outputs that are not finite."""
        losses = []
        for batch, inputs_BTD in enumerate(self.recording.hidden):
            output_BTD = self._run(batch, inputs_BTD)
            blocks.check_finite(output_BTD, f"output of block {self.index}")
            losses.append(float(self.method.loss(output_BTD, self.teacher.wanted[batch].to(self.device))))
            keep(batch, output_BTD.to("cpu"))
        return math.fsum(losses) / len(losses)
