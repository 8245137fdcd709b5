"""Base classes of the learned methods: they replace linear layers by trainable ones, and read a mask off these later.

`maskgen.train` has the loop, the data, the loss and the learning rate; a method has the arithmetic of one layer. Every
target layer becomes a `LearnedLinear`, which computes one of three things:

    TRAIN   the layer that is trained: with a soft mask, say, through which gradients flow
    HARD    the layer as it would be exported now: it is evaluated, and served in the end
    DENSE   the layer as it was before: the teacher of a distillation, which takes no memory if weights are frozen

Step number and randomness are arguments: a `StepContext` says which step it is, and its `noise_seed` is the only source
of noise. So a run that was killed and resumed draws the same numbers, and a backward pass can draw them again instead
of keeping them. What a layer or an optimiser needs from one step in the next is a parameter, a persistent buffer or a
tensor of the optimiser's state, because these are what a training checkpoint holds.

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
from maskgen.methods import Correction, Method, Solution
from maskgen.numerics.shards import full


class Mode(Enum):
    """What a `LearnedLinear` computes."""

    TRAIN = "train"
    HARD = "hard"
    DENSE = "dense"


class Result(Enum):
    """What a training run writes in the end.

    SPARSE is a sparse checkpoint, DENSE a dense model of the same size, SLICED a dense model with fewer heads and
    hidden neurons.
    """

    SPARSE = "sparse"
    DENSE = "dense"
    SLICED = "sliced"


@dataclass(frozen=True)
class StepContext:
    """Which step of a training run is computed: number `step`, counted from 0, of `steps`.

    `noise_seed` is the seed of all random numbers of the step. It is another one in every step, and for every sample of
    a batch that gets noise of its own.
    """

    step: int
    steps: int
    noise_seed: int = 0

    @property
    def progress(self) -> float:
        """How far the run is: 0 in the first step, 1 in the last."""
        return self.step / max(1, self.steps - 1)


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer that a method may replace.

    `index` is its number among the target layers of the model, `name` its module name. `prior_OI` is a bool mask
    `[O, I]` to start from, or None. `units` matters to methods that remove whole heads or hidden neurons: into how many
    equal ranges its input columns divide, which is the number of key-value groups for an attention output and the
    hidden width for an FFN output; None for every other layer. `correction` is what the checkpoint that training goes
    on from has beside the layer, in float32; `linear` then holds that checkpoint's weight.
    """

    index: int
    name: str
    linear: nn.Linear
    pattern: NMPattern
    prior_OI: Tensor | None = None
    units: int | None = None
    correction: Correction | None = None


class LearnedLinear(nn.Module, ABC):
    """Takes the place of one `nn.Linear` during training. Subclasses add the parameters that are learned.

    `weight` `[O, I]` and `bias` `[O]` are the parameters of the replaced layer, under their old names. `mode` says what
    `forward` computes. `context` is the current step; the training loop sets both.
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
        """`[..., I] -> [..., O]`, as `mode` says."""
        if self.mode is Mode.DENSE:
            return dense_linear(x, self.weight, self.bias)
        if self.mode is Mode.HARD:
            return self.hard_forward(x)
        return self.train_forward(x)

    def hard_forward(self, x: Tensor) -> Tensor:
        """The layer as it would be exported now, `[..., I] -> [..., O]`.

        The mask is computed in every pass, not kept: a byte for each weight of a model is too much.
        """
        return dense_linear(x, self.weight * self.mask(), self.bias)

    @abstractmethod
    def train_forward(self, x: Tensor) -> Tensor:
        """The layer that is trained, `[..., I] -> [..., O]`, in the step `self.context`.

        Differentiable in `x` and in every parameter that is learned.
        """

    @abstractmethod
    def mask(self) -> Tensor:
        """The bool mask `[O, I]` that would be exported now."""

    def solution(self) -> Solution:
        """What would be exported of this layer now. Methods that change weights or add a correction override it."""
        return Solution(self.mask())


class _Masked(torch.autograd.Function):
    """(m * W) x + b for fixed m, W, b. The backward pass computes m * W again instead of keeping it for each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, mask_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI, mask_OI)
        return dense_linear(x, weight_OI * mask_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        weight_OI, mask_OI = ctx.saved_tensors
        return dy @ (weight_OI * mask_OI).to(dy.dtype), None, None, None


class FixedLinear(LearnedLinear):
    """A layer whose mask is fixed to its prior while other layers learn theirs: TRAIN and HARD compute the same."""

    def __init__(self, target: TargetLayer) -> None:
        super().__init__(target)
        assert target.prior_OI is not None
        self.register_buffer("kept_OI", target.prior_OI, persistent=False)

    def train_forward(self, x: Tensor) -> Tensor:
        """(m * W) x + b. m * W is computed again in each pass, backward too, so no second copy of the weights stays."""
        y: Tensor = _Masked.apply(x, self.weight, self.get_buffer("kept_OI"), self.bias)
        return y

    def mask(self) -> Tensor:
        """The prior."""
        return self.get_buffer("kept_OI")

    def solution(self) -> Solution:
        """The prior, and the weight as it was loaded: that of the checkpoint, where training goes on from one."""
        return Solution(self.mask(), full(self.weight.detach()) * self.mask())


Layers = Mapping[str, LearnedLinear]
"""Every replaced layer by full module name, in model order."""


@dataclass(frozen=True)
class LearnedMethod(Method, ABC):
    """Base of the methods that train the whole model with its loss.

    `trains_weights` says whether weights change: if so, the teacher of a distillation is a frozen copy of the model,
    else the same tensors without masks. `result` is what a run writes.
    """

    trains_weights: ClassVar[bool] = False
    result: ClassVar[Result] = Result.SPARSE

    @property
    def uses_prior_weights(self) -> bool:
        """Whether training starts from the weights of the prior, too, with these options."""
        return False

    @abstractmethod
    def attach(self, target: TargetLayer, generator: torch.Generator) -> LearnedLinear | None:
        """The layer that takes the place of `target.linear`, or None to leave that where it is.

        All parameters of the model are frozen before; those to be trained must get `requires_grad`. `generator` is for
        random initial values.
        """

    @abstractmethod
    def optimizer(self, layers: Layers, others: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimiser of the learned parameters of `layers` and of `others` (norms and embeddings, often none)."""

    def regulariser(self, layers: Layers, context: StepContext) -> Tensor | None:
        """A scalar to add to the loss of every micro-batch, or None. Called after the forward pass."""
        return None

    def before_step(self, layers: Layers, context: StepContext) -> None:
        """Called once per optimiser step, before its first forward pass: to choose a new mask, say."""

    def after_step(self, layers: Layers, context: StepContext, lr: float) -> None:
        """Called once per optimiser step, after it and without gradients: to apply a proximal map, say.

        `lr` is the learning rate of the step.
        """

    def kept_units(self, layers: Layers) -> Mapping[str, Tensor]:
        """For `Result.SLICED`: which units stay, bool `[units]`, by name of every layer with `TargetLayer.units`."""
        return {}


def learned_parameters(layers: Layers) -> list[nn.Parameter]:
    """Every trained parameter of the replaced layers, in model order."""
    return [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
