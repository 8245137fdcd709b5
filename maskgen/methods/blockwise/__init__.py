"""Base class of the methods that train one decoder block after the other, when a one-shot method has pruned it.

`maskgen.sweep.reconstruct` runs the block and holds its activations; a method has the arithmetic: how far an output is
from the one wanted, and what a step does to the weights. Nothing is trained end to end: the memory is that of one block
and its optimiser, whatever the size of the model.

Legend: B = windows of a batch, T = tokens, D = hidden size, O = out features, I = in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgen.methods import Method


class Fit(ABC):
    """The training of one block's weights."""

    @abstractmethod
    def step(self, output_BTD: Tensor, wanted_BTD: Tensor) -> float:
        """One optimiser step towards `wanted_BTD`; the loss before it.

        `output_BTD` is what the block computed with the weights of now. A loss that is not finite changes nothing.
        """


@dataclass(frozen=True)
class BlockMethod(Method, ABC):
    """Trains the weights that stay of a pruned block.

    `epochs` is how often all calibration windows are seen. `inputs` says what the block gets to read: the outputs of
    the pruned blocks before it ("pruned"), of the dense ones ("dense"), or of both in turn ("mixed"). Every method has
    these two as options.
    """

    epochs: int
    inputs: str

    @property
    def uses_prior(self) -> bool:
        """It can start from any mask, or from what a recipe's [prior] makes."""
        return True

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products while the block is trained; weights and loss are float32."""

    @abstractmethod
    def loss(self, output_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
        """How far a block's float32 output is from the one wanted: a differentiable number, 0 where they are equal."""

    @abstractmethod
    def fit(self, weights: Sequence[Tensor], masks: Sequence[Tensor], steps: int) -> Fit:
        """Begin to train `weights`, float32 `[O, I]` leaves that require gradients, in place; `steps` steps follow.

        `masks` are bool `[O, I]`. Pruned weights are 0 and stay 0.
        """
