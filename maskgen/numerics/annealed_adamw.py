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

from collections.abc import Callable, Iterable, Mapping, Sequence
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

    All other parameters take plain AdamW steps. `update` is the function of that name, or that compiled. Of sharded
    parameters each process updates the rows it holds.
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
        self.update: Update = update
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` must be None."""
        assert closure is None, "the loss is computed by the driver"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mu"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        time, pruned = float(state["step"]), self._pruned.get(parameter)
        kept_OI, pull = (None, 0.0) if pruned is None else pruned()
        weight_decay = group["weight_decay"] if parameter.ndim == 2 else 0.0
        factors = (1 - BETAS[0] ** time, 1 - BETAS[1] ** time, group["lr"], group["lr"] * weight_decay, pull)
        tensors = [parameter.detach(), gradient.contiguous(), state["mu"], state["v"]]
        parts = [local(tensor).view(-1).split(self._part(parameter)) for tensor in tensors]
        masks: Sequence[Tensor | None] = [None] * len(parts[0])
        if kept_OI is not None:
            masks = rows_of(parameter, kept_OI).reshape(-1).split(self._part(parameter))
        for weight, g, mu, v, kept in zip(*parts, masks, strict=True):
            self.update(weight, g, mu, v, kept, torch.tensor(factors), self._raw_moment)

    def _part(self, parameter: nn.Parameter) -> int:
        """How many weights are updated at a time: what is compiled has nothing in between to be kept in a cache."""
        return chunk_elements(parameter.device) if self.update is update else parameter.numel()


def update(
    weight: Tensor, g: Tensor, mu: Tensor, v: Tensor, kept: Tensor | None, factors: Tensor, raw_moment: bool
) -> None:
    """One step of some weights of a parameter and of their moments, in place; all of one shape.

    `kept` is their mask, or None for plain AdamW. `factors` are 1 - b1^t, 1 - b2^t, the learning rate, that times the
    weight decay, and lambda.
    """
    first, second, lr, shrink, pull = factors.unbind()
    b1, b2 = BETAS
    mu.lerp_(g, 1 - b1)
    u = mu / first
    if kept is None:
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
    else:
        decay = (weight * pull).masked_fill_(kept, 0)
        u = u + decay
        v.mul_(b2)
        for term in (g, decay) if raw_moment else (u,):
            v.addcmul_(term, term, value=1 - b2)
    scale = (v / second).sqrt_().add_(EPS)
    weight.sub_(weight * shrink).sub_(u.mul_(lr).div_(scale))


Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, bool], None]
"""The signature of `update`."""
