"""AST's optimiser: AdamW whose step also pulls pruned weights towards zero.

With m the mask of a weight matrix W, g = dL/d(m * W), and lambda the decay of the step:

    mu = b1 mu + (1 - b1) g
    u  = mu / (1 - b1^t) + lambda (1 - m) W
    v  = b2 v + (1 - b2) u^2
    W <- (1 - lr wd) W - lr u / (sqrt(v / (1 - b2^t)) + eps)

The decay joins after the first moment, so momentum stays that of the loss, and v is built from what is used. v then
follows mu^2, not g^2, and steps are several times those of ordinary Adam at the same rate: learning rates do not carry
over. Where gradients are small the decay moves a weight by about lr per step whatever lambda is: lambda decides when
the decay wins, the sum of learning rates how far it goes. With a raw second moment it is ordinary Adam where weights
are kept, v = b2 v + (1 - b2) (g^2 + (lambda (1 - m) W)^2); with g^2 alone a pruned weight that hardly has a gradient
would be thrown far across zero, and runs diverge (seen).

Ours: the first moment is divided by 1 - b1^t before it goes into v. The release divides afterwards: its first step is
ten times lr, and the first twenty together go more than twice as far as they should, which undoes a good start.

The arithmetic is done a part of the tensors at a time, so that what is computed in between stays in the processor's
cache: on a CPU the update would else be bound by memory and take as long as the forward pass of a small batch.

Source: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.numerics.memory import chunk_elements
from maskgen.numerics.shards import local, rows_of

BETAS, EPS = (0.9, 0.95), 1e-8

Pruned = Callable[[], tuple[Tensor, float]]
"""The current mask of a weight (bool, its shape, True where kept), and lambda in the current step."""


class AnnealedAdamW(torch.optim.Optimizer):
    """The update of the module docstring for every parameter in `pruned`.

    All other parameters take plain AdamW steps. Of sharded parameters each process updates the rows it holds.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        pruned: Mapping[nn.Parameter, Pruned],
        lr: float,
        weight_decay: float = 0.0,
        raw_moment: bool = False,
    ) -> None:
        self._pruned = dict(pruned)
        self._raw_moment = raw_moment
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` must be None."""
        assert closure is None, "the loss is computed by the driver"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mu"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        size, pruned = chunk_elements(parameter.device), self._pruned.get(parameter)
        tensors = [parameter.detach(), gradient.contiguous(), state["mu"], state["v"]]
        parts = zip(*(local(tensor).view(-1).split(size) for tensor in tensors), strict=True)
        step = _Step(
            float(state["step"]), group["lr"], group["weight_decay"] if parameter.ndim == 2 else 0.0, self._raw_moment
        )
        if pruned is None:
            for part in parts:
                step.take(*part)
            return
        kept_OI, pull = pruned()
        masks = rows_of(parameter, kept_OI).reshape(-1).split(size)
        for (weight, g, mu, v), kept in zip(parts, masks, strict=True):
            step.take(weight, g, mu, v, (weight * pull).masked_fill_(kept, 0))


@dataclass(frozen=True)
class _Step:
    """Step number `time`, from 1, of one parameter."""

    time: float
    lr: float
    weight_decay: float
    raw_moment: bool

    def take(self, weight: Tensor, g: Tensor, mu: Tensor, v: Tensor, decay: Tensor | None = None) -> None:
        """Update a part of the weights and their moments, all of one shape; `decay` is lambda (1 - m) W."""
        b1, b2 = BETAS
        u = mu.lerp_(g, 1 - b1) / (1 - b1**self.time)
        used = [g]
        if decay is not None:
            u += decay
            used = [g, decay] if self.raw_moment else [u]
        v.mul_(b2)
        for term in used:
            v.addcmul_(term, term, value=1 - b2)
        scale = v.sqrt().div_(math.sqrt(1 - b2**self.time)).add_(EPS)
        weight.mul_(1 - self.lr * self.weight_decay).addcdiv_(u, scale, value=-self.lr)
