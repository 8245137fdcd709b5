"""AdamW with moments in bfloat16: half the memory of the optimiser's states, for parameters in the billions.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The arithmetic is float32, in chunks, and only what is kept between steps is rounded. That is safe as long as a step
moves a moment by more than bfloat16's half unit in the last place (0.2 to 0.4 %): with b1 = 0.9 and b2 = 0.95 even a
gradient of zero moves them by 10 and 5 %, so neither can get stuck. With the usual b2 = 0.999, v could, so that raises
an error. The parameters themselves stay as they are, in float32.

Sources: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from maskgen.numerics.memory import chunk_elements
from maskgen.numerics.shards import local

SLOWEST_DECAY = 0.98
"""Largest b1 and b2: one step must change a moment by more than twice its rounding error."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW over dense parameters; `exp_avg` and `exp_avg_sq` are kept in bfloat16, sharded as the parameter is."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if max(betas) > SLOWEST_DECAY:
            raise ValueError(f"betas {betas}: above {SLOWEST_DECAY} a moment in bfloat16 can get stuck; use AdamW")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the base class would give the moments the dtype of their parameter, so they are cast back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                _update(parameter, parameter.grad, state, group)


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    time, lr = int(state["step"]), group["lr"]
    rate, scale = lr / (1 - beta1**time), (1 - beta2**time) ** 0.5
    size = chunk_elements(parameter.device)
    tensors = (parameter, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"])
    for p, g, mean, square in zip(*(local(tensor).view(-1).split(size) for tensor in tensors), strict=True):
        g = g.to(p.dtype)
        m = mean.to(p.dtype).lerp_(g, 1 - beta1)
        v = square.to(p.dtype).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        mean.copy_(m)
        square.copy_(v)
        p.mul_(1 - lr * group["weight_decay"])
        p.addcdiv_(m, v.sqrt_().div_(scale).add_(group["eps"]), value=-rate)
