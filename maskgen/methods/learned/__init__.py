"""What a learned method is: it replaces linear layers by ones whose sparsity can be trained, and reads the answer back.

`maskgen.train.step` owns the loop, the data, the loss and the optimiser's clock; a method owns the arithmetic of one
layer. Every target becomes a `LearnedLinear` that computes one of three things:

    TRAIN   the relaxed layer that gradients flow through (soft masks, straight-through masks, ...)
    HARD    the layer as it would be exported now: what is evaluated and what is served
    DENSE   the layer as it was given: the teacher, when the weights are frozen, at no cost in memory

Time and randomness are arguments: a `StepContext` says which step it is, and its `noise_seed` is the only source of
noise, so that a run that was killed and resumed draws the same numbers, and a backward pass can draw them again
instead of keeping them. What a layer or an optimiser must remember from step to step is a parameter, a persistent
buffer or a tensor of the optimiser's state: these are what a checkpoint holds.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.core.pattern import NMPattern
from maskgen.methods import Method, Solution


class Mode(Enum):
    """What a `LearnedLinear` computes."""

    TRAIN = "train"
    HARD = "hard"
    DENSE = "dense"


class Result(Enum):
    """What a run writes: a sparse checkpoint, a dense model, or a dense model with fewer heads and neurons."""

    SPARSE = "sparse"
    DENSE = "dense"
    SLICED = "sliced"


@dataclass(frozen=True)
class StepContext:
    """When it is: `step` of `steps`, counted from 0. `noise_seed` differs from step to step and sample to sample."""

    step: int
    steps: int
    noise_seed: int = 0

    @property
    def progress(self) -> float:
        """0 in the first step, 1 in the last."""
        return self.step / max(1, self.steps - 1)


@dataclass(frozen=True)
class TargetLayer:
    """One layer a method may replace.

    `index` numbers the layers of the model. `prior_OI` is a bool mask to start from, or None. `units` says into how
    many equal runs of columns the input of this layer divides when whole heads or neurons are pruned (key-value groups
    for an attention output, hidden width for an FFN output), and is None for every other layer.
    """

    index: int
    name: str
    linear: nn.Linear
    pattern: NMPattern
    prior_OI: Tensor | None = None
    units: int | None = None


class LearnedLinear(nn.Module, ABC):
    """Takes the place of one `nn.Linear` while its sparsity is learned. Subclasses add what is learned.

    `weight` `[O, I]` and `bias` `[O]` are the parameters of the layer replaced, under their old names. `mode` is what
    `forward` computes.
    """

    context: StepContext
    mode: Mode

    def __init__(self, target: TargetLayer) -> None:
        super().__init__()
        self.index, self.name, self.pattern = target.index, target.name, target.pattern
        self.weight, self.bias = target.linear.weight, target.linear.bias
        self.in_features, self.out_features = target.linear.in_features, target.linear.out_features
        self.context = StepContext(0, 1)
        self.mode = Mode.TRAIN

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I] -> [..., O]`, by `mode`."""
        if self.mode is Mode.DENSE:
            return dense_linear(x, self.weight, self.bias)
        if self.mode is Mode.HARD:
            return self.hard_forward(x)
        return self.train_forward(x)

    def hard_forward(self, x: Tensor) -> Tensor:
        """The layer as it would be exported now. No mask is kept between passes: a byte per weight would add up."""
        return dense_linear(x, self.weight * self.mask(), self.bias)

    @abstractmethod
    def train_forward(self, x: Tensor) -> Tensor:
        """The relaxed layer at `self.context`; differentiable in everything that is learned."""

    @abstractmethod
    def mask(self) -> Tensor:
        """The bool mask `[O, I]` that would be exported now."""

    def solution(self) -> Solution:
        """The answer for this layer. Methods that change weights or add a correction override it."""
        return Solution(self.mask())


class _Masked(torch.autograd.Function):
    """(m * W) x + b for fixed m, W, b. The backward pass makes m * W again: a product kept per layer would add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, mask_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI, mask_OI)
        return dense_linear(x, weight_OI * mask_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        weight_OI, mask_OI = ctx.saved_tensors
        return dy @ (weight_OI * mask_OI).to(dy.dtype), None, None, None


class FixedLinear(LearnedLinear):
    """A layer that keeps the mask it was given while others learn; its TRAIN forward is the HARD one."""

    def __init__(self, target: TargetLayer) -> None:
        super().__init__(target)
        assert target.prior_OI is not None
        self.register_buffer("kept_OI", target.prior_OI, persistent=False)

    def train_forward(self, x: Tensor) -> Tensor:
        """(m * W) x + b, m * W made anew in each pass, backward too: no second copy of the weights stays."""
        y: Tensor = _Masked.apply(x, self.weight, self.get_buffer("kept_OI"), self.bias)
        return y

    def mask(self) -> Tensor:
        """The mask given."""
        return self.get_buffer("kept_OI")


Layers = Mapping[str, LearnedLinear]
"""Every replaced layer by full module name, in model order."""


@dataclass(frozen=True)
class LearnedMethod(Method, ABC):
    """Base of the methods that learn end to end. Options are the fields of the (frozen) dataclass, as in `LocalMethod`.

    `trains_weights` decides who the teacher is (the same tensors without masks, or a frozen copy) and what the result
    may be compared with.
    """

    trains_weights: ClassVar[bool] = False
    result: ClassVar[Result] = Result.SPARSE

    @property
    def uses_prior(self) -> bool:
        """Whether these options ask the driver for a mask to start from."""
        return False

    @abstractmethod
    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear | None:
        """The layer that takes the place of `target.linear`, or None to leave it as it is.

        What is to be trained has `requires_grad`; everything else of the model is frozen by the driver beforehand.
        """

    @abstractmethod
    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimiser of what is learned in `layers` and of `others` (norms, embeddings; often none)."""

    def regulariser(self, layers: Layers, context: StepContext) -> Tensor | None:
        """A scalar added to the loss of every micro-batch, or None. Asked after the forward pass."""
        return None

    def before_step(self, layers: Layers, context: StepContext) -> None:
        """Called once per optimiser step before its first forward pass (refresh a mask, say)."""

    def after_step(self, layers: Layers, context: StepContext, lr: float) -> None:
        """Called once per optimiser step after it (a proximal map, say), without gradients; `lr` is the step's."""

    def kept_units(self, layers: Layers) -> Mapping[str, Tensor]:
        """For `Result.SLICED`: which units stay, bool `[units]` by name, of every layer with `TargetLayer.units`."""
        return {}


def learned_parameters(layers: Layers) -> list[nn.Parameter]:
    """Every trained parameter of the replaced layers, in model order."""
    return [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
