"""The control: the dense model after the same extra steps, with nothing pruned.

A method that trains weights also goes on training the model, on text it may not have seen enough of. What it gains over
the model as it was given is therefore not all due to the method. This one trains the same weights on the same windows
with plain AdamW and no sparsity; compare sparse results with it at equal steps.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.methods import Solution
from maskgen.methods.learned import Layers, LearnedLinear, LearnedMethod, Result, TargetLayer
from maskgen.numerics.shards import full

BETAS = (0.9, 0.95)
"""Those of the sparse training this is compared with."""


class DenseLinear(LearnedLinear):
    """An `nn.Linear` whose weight trains."""

    def __init__(self, target: TargetLayer) -> None:
        super().__init__(target)
        self.weight.requires_grad_(True)

    def train_forward(self, x: Tensor) -> Tensor:
        """The dense layer."""
        return dense_linear(x, self.weight, self.bias)

    def hard_forward(self, x: Tensor) -> Tensor:
        """The dense layer: this is what is exported."""
        return dense_linear(x, self.weight, self.bias)

    def mask(self) -> Tensor:
        """Everything is kept."""
        return torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)

    def solution(self) -> Solution:
        """The trained weight, all of it."""
        return Solution(self.mask(), full(self.weight.detach()))


@dataclass(frozen=True)
class DenseControl(LearnedMethod):
    """`weight_decay`: of matrices; norms and biases do not decay."""

    trains_weights: ClassVar[bool] = True
    result: ClassVar[Result] = Result.DENSE

    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        self.require_not_negative("weight_decay")

    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear | None:
        """A dense layer that trains."""
        return DenseLinear(target)

    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """AdamW of everything."""
        parameters = [*(layer.weight for layer in layers.values()), *others]
        groups = [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr, betas=BETAS)


METHOD = DenseControl
