"""What the sparsity of each layer costs, as a share of the KL divergence between the dense and the sparse model.

Making one layer sparse costs more or less, depending on which others are. So the model goes from dense to sparse in
small steps, all layers at once, W(t) = (1 - t) dense + t sparse, and every layer is charged with its part of the rise:

    cost of a layer = integral over t from 0 to 1 of <d KL(t) / d W, sparse - dense> over the weights of the layer

The costs of all layers sum up to the KL divergence of the sparse model; it is the price of Aumann and Shapley, what a
layer adds on average over all the models on the way. The integral is a sum over few points (Gauss and Legendre's), and
the derivatives at one of them are one pass forward and one backward, whatever the number of layers. Blocks are run one
by one, as in a sweep: the memory is that of one block with its gradients, and the activations in front of each block.

Sources: Aumann and Shapley, "Values of Non-Atomic Games" (1974); Sundararajan et al., "Axiomatic Attribution for Deep
Networks", ICML 2017, which integrates gradients over inputs in the same way.

Legend: S = windows, B = batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskgen.hf import blocks
from maskgen.hf.evaluate import Measured, measure
from maskgen.hf.logits import Logits, logits_of
from maskgen.hf.planning import Plan
from maskgen.hf.pruning_cost import Baseline, HeldOutText, logits_after
from maskgen.numerics.memory import peak_rss_bytes
from maskgen.numerics.products import products_dtype
from maskgen.sweep.report import Progress

POINTS = 3
"""Points of the integral, which is exact for a rise that is a polynomial of degree 6."""

Weights = Callable[[str], Tensor]
"""The weight `[O, I]` of a layer by name, on the CPU: for a sparse layer the one that computes the same, with
its correction if there is one."""


@dataclass(frozen=True)
class Probe:
    """A model on a few windows of text, to be run with other weights than its own, which stay dense.

    `recording` has the inputs of its first block, one window to a batch, `template` what its last block puts out, and
    `dense` the outputs of that with its own weights.
    """

    model: nn.Module
    plan: Plan
    text: HeldOutText
    logits: Logits
    recording: blocks.Recording
    template: Any
    dense: Sequence[Tensor]
    device: torch.device

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, plan: Plan, text: HeldOutText, device: str) -> Probe:
        """Of the dense model. Raises `ModelError` for one whose logits do not follow from its last block."""
        first = HeldOutText(text.ids_ST[:1], text.bos_tokens, text.names)
        (template,) = Baseline.record(model, plan.blocks, first, lambda done, windows: None).outputs
        last = template[0] if isinstance(template, tuple) else template
        products = products_dtype(last.dtype, torch.device(device))
        recording = blocks.record(model, plan.blocks, text.ids_ST.split(1), products)
        probe = cls(model, plan, text, logits_of(model), recording, template, [], torch.device(device))
        *_, dense = probe.forward()
        return cls(model, plan, text, probe.logits, recording, template, dense, probe.device)

    @torch.no_grad()
    def forward(self, mixed: Callable[[int], None] = lambda index: None) -> Iterator[list[Tensor]]:
        """The inputs of each block in turn, and at last the outputs of the last one.

        `mixed` is called when a block is in float32, and may change its weights, until it has run.
        """
        hidden = list(self.recording.hidden)
        for index in range(len(self.plan.blocks)):
            yield list(hidden)
            with self.at_work(index, mixed):
                for window, hidden_1TD in enumerate(hidden):
                    hidden[window] = self.run(index, window, hidden_1TD).to("cpu")
                    blocks.check_finite(hidden[window], f"output of block {index}")
        yield hidden

    @contextmanager
    def at_work(self, index: int, mixed: Callable[[int], None]) -> Iterator[None]:
        """Block number `index` in float32 with the weights that `mixed` gives it; afterwards it is as before."""
        block, targets = self.plan.blocks[index], self.plan.targets[index]
        with blocks.upcast(block, self.device):
            own = {name: linear.weight.data for name, linear in targets.items()}
            try:
                mixed(index)
                yield
            finally:
                for name, linear in targets.items():
                    linear.weight.data = own[name]

    def run(self, index: int, window: int, hidden_1TD: Tensor) -> Tensor:
        """What block number `index`, at work, makes of a window: float32, on its device.

        Products are of bfloat16 if the model is and the device multiplies that faster: measuring is many passes.
        """
        call, block = self.recording.call(window, index), self.plan.blocks[index]
        return blocks.forward(block, hidden_1TD, call, self.device)

    def compare(self, hidden: Sequence[Tensor]) -> Measured:
        """The model against the dense one, when its last block puts out `hidden`, a window in each."""
        found, dense = (
            logits_after(self.logits, self.plan.blocks, map(self._output, some)) for some in (hidden, self.dense)
        )
        return measure(found, self.text.windows, self.text.protocol, 1, dense)

    @torch.enable_grad()
    def gradient(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of the mean KL divergence over all tokens by each of `hidden`.

        That by a token's logits is q - p, the difference of the model's and the dense one's probabilities.
        """
        found = []
        for window, hidden_1TD, dense_1TD in zip(self.text.windows, hidden, self.dense, strict=True):
            leaf_1TD = hidden_1TD.detach().requires_grad_(True)
            ids_1T = torch.tensor([window.ids])
            outputs = [self._output(one) for one in (leaf_1TD, dense_1TD)]
            after, dense = (logits_after(self.logits, self.plan.blocks, [one])(ids_1T) for one in outputs)
            for found_1nV, dense_1nV in zip(after, dense, strict=True):
                difference_1nV = found_1nV.detach().float().softmax(-1) - dense_1nV.float().softmax(-1)
                found_1nV.backward(difference_1nV.to(found_1nV.dtype), retain_graph=True)
            assert leaf_1TD.grad is not None
            found.append(leaf_1TD.grad / (len(self.text.windows) * len(window.ids)))
        return found

    def _output(self, hidden_1TD: Tensor) -> Any:
        cast_1TD = hidden_1TD.to(self._last.device, self._last.dtype)
        return (cast_1TD, *self.template[1:]) if isinstance(self.template, tuple) else cast_1TD

    @property
    def _last(self) -> Tensor:
        """A tensor as the last block puts it out."""
        found: Tensor = self.template[0] if isinstance(self.template, tuple) else self.template
        return found


def costs(
    probe: Probe,
    sparse: Weights,
    known: list[dict[str, float]],
    progress: Callable[[Progress], None],
    save: Callable[[], None],
) -> None:
    """What each layer costs, by name in nats per token: the terms of the integral, one after the other.

    `sparse` are the sparse weights. `known` has the terms of the first points, where an earlier process found them, and
    gets the others; `save` is called after each of them.
    """
    started_s = time.perf_counter()
    places, shares = np.polynomial.legendre.leggauss(POINTS)
    for point in range(len(known), POINTS):

        def tell(block: int, what: str = f"costs of layers, pass {point + 1} of {POINTS}") -> None:
            progress(Progress(block, len(probe.plan.blocks), what, time.perf_counter() - started_s, peak_rss_bytes()))

        terms = _derivatives(probe, sparse, (float(places[point]) + 1) / 2, tell)
        known.append({name: term * float(shares[point]) / 2 for name, term in terms.items()})
        save()


def mixture(probe: Probe, share: Callable[[str], float], sparse: Weights) -> Callable[[int], None]:
    """For `Probe.forward`: every layer moved by `share` of the way from its dense weight to its sparse one."""

    def mixed(index: int) -> None:
        for name, linear in probe.plan.targets[index].items():
            if part := share(name):
                sparse_OI = sparse(name).to(linear.weight.device, blocks.COMPUTE_DTYPE)
                linear.weight.data = sparse_OI if part == 1 else torch.lerp(linear.weight.data, sparse_OI, part)

    return mixed


@torch.no_grad()
def _derivatives(probe: Probe, sparse: Weights, part: float, tell: Callable[[int], None]) -> dict[str, float]:
    """<d KL / d W, sparse - dense> of every layer, where all are moved by `part` of the way."""
    mixed = mixture(probe, lambda name: part, sparse)
    *fronts, outputs = probe.forward(mixed)
    gradients, found = probe.gradient(outputs), {}
    del outputs
    for index in reversed(range(len(probe.plan.blocks))):
        targets = probe.plan.targets[index]
        own = {name: linear.weight.detach().clone() for name, linear in targets.items()}
        steps = {name: sparse(name).float() - own[name].float() for name in targets}
        with probe.at_work(index, mixed):
            totals = _backward(probe, index, fronts.pop(), gradients)
        for name, total_OI in totals.items():
            found[name] = float((total_OI * steps[name].to(total_OI.device)).sum(dtype=torch.float64))
        tell(len(probe.plan.blocks) - 1 - index)
    return found


def _backward(probe: Probe, index: int, inputs: Sequence[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    """The gradient of each layer of a block; `gradients` by its outputs become those by its inputs."""
    weights = {name: linear.weight for name, linear in probe.plan.targets[index].items()}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for window, input_1TD in enumerate(inputs):
            with torch.enable_grad():
                leaf_1TD = input_1TD.to(probe.device).detach().requires_grad_(True)
                output_1TD = probe.run(index, window, leaf_1TD)
                by_input, *by_weight = torch.autograd.grad(
                    output_1TD, [leaf_1TD, *weights.values()], gradients[window].to(probe.device), allow_unused=True
                )
            gradients[window] = by_input.to("cpu")
            for name, gradient_OI in zip(weights, by_weight, strict=True):
                if gradient_OI is not None:
                    totals[name] += gradient_OI
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return totals
