"""What the tests of AST share: one small layer and its steps.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import StepContext, TargetLayer
from maskgen.methods.learned.adaptive_sparse import AdaptiveLinear, AdaptiveSparse

PATTERN = NMPattern(2, 4)
OUT, IN = 8, 32


def attach(method: AdaptiveSparse, seed: int = 0, prior_OI: Tensor | None = None) -> AdaptiveLinear:
    linear = nn.Linear(IN, OUT)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.normal_(0, 0.1, generator=generator)
        linear.bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    linear.requires_grad_(False)
    layer = method.attach(TargetLayer(0, "a", linear, PATTERN, prior_OI), generator)
    assert isinstance(layer, AdaptiveLinear)
    return layer


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(layer: AdaptiveLinear, optimizer: torch.optim.Optimizer, gradient_OI: Tensor, at: int, steps: int) -> None:
    layer.context = StepContext(at, steps)
    layer.weight.grad = gradient_OI.clone()
    optimizer.step()


def magnitude(weight_OI: Tensor) -> Tensor:
    return PATTERN.mask_from_scores(weight_OI.detach().abs())
