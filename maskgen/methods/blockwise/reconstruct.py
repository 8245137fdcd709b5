"""Block reconstruction: train the weights that stay until the pruned block puts out what the dense one does.

A one-shot method solves one layer at a time for that layer's output. This goes on from there for all layers of a block
together, by gradient descent: attention, nonlinearities and the other layers of the block make up for what each one
lost, and since the block reads what the pruned blocks before it really put out, for their errors too. The mask stays.

    loss = mean over tokens of ||y - y*||^2 / ||y*||^2        y: the pruned block's output, y*: the dense block's

The residual stream holds a few tokens, the first of a window above all, that are hundreds of times longer than the
others: a plain mean of squares would be about these tokens only. The norm at the entry of the next block divides every
token by its length, and so does this loss.

Sources: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, and Li et al., "BRECQ:
Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021, for rounding; arXiv 2510.14444 for
pruning.

Legend: B = windows of a batch, T = tokens, D = hidden size, O = out features, I = in features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from maskgen.core.errors import RecipeError
from maskgen.methods.blockwise import BlockMethod, Fit
from maskgen.numerics.products import ProductsDtype, dtype_of

_SMALLEST = 1e-12
"""Least squared length of a token that is divided by."""


@dataclass(frozen=True)
class Reconstruct(BlockMethod):
    """`lr` is Adam's learning rate at its highest, as a share of the size (root mean square) of a layer's kept weights
    at the start: Adam's steps do not depend on the size of gradients, and some models have weights ten times as large
    as others. It rises during the first `warmup` of the steps, then falls in a cosine to `final_lr` times that. `dtype`
    is that of matrix products, "bfloat16" or "float32"; "auto" is bfloat16 where the device multiplies it faster.
    """

    epochs: int = 8
    inputs: str = "pruned"
    lr: float = 0.02
    warmup: float = 0.05
    final_lr: float = 0.0
    dtype: ProductsDtype = "auto"

    def __post_init__(self) -> None:
        self.require_positive("lr")
        self.require_not_negative("warmup", "final_lr", most=1)
        self.require_one_of(inputs=("pruned", "dense", "mixed"), dtype=get_args(ProductsDtype))
        if self.epochs < 1:
            raise RecipeError(f"method.epochs {self.epochs}: expected a positive number, such as 8")

    @property
    def compute_dtype(self) -> torch.dtype:
        """What `dtype` names."""
        return dtype_of(self.dtype)

    def loss(self, output_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
        """Squared error of a token relative to its squared length, mean over tokens."""
        error_BT = (output_BTD - wanted_BTD).square().sum(-1)
        return (error_BT / wanted_BTD.square().sum(-1).clamp_min(_SMALLEST)).mean()

    def fit(self, weights: Sequence[Tensor], masks: Sequence[Tensor], steps: int) -> Fit:
        """Adam, without weight decay."""
        return _AdamFit(self, weights, masks, steps)

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step number `step`, from 0, of `steps`, for weights of size 1."""
        warm = self.warmup * steps
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        progress = (step - warm) / max(1.0, steps - warm)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class _AdamFit(Fit):
    """Adam over kept weights. A pruned weight never has a gradient, so its moments and the weight itself stay 0."""

    def __init__(self, method: Reconstruct, weights: Sequence[Tensor], masks: Sequence[Tensor], steps: int) -> None:
        self._method, self._weights, self._masks, self._steps = method, weights, masks, steps
        groups = [
            {"params": [weight], "size": _size(weight.detach(), mask_OI)}
            for weight, mask_OI in zip(weights, masks, strict=True)
        ]
        self._adam = torch.optim.Adam(groups, lr=method.lr, betas=(0.9, 0.95))
        self._step = 0

    def step(self, output_BTD: Tensor, wanted_BTD: Tensor) -> float:
        """The gradient of the loss, where the mask keeps weights, and Adam's step along it."""
        loss = self._method.loss(output_BTD, wanted_BTD)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)  # None: no token came by
        for weight, mask_OI, gradient_OI in zip(self._weights, self._masks, gradients, strict=True):
            weight.grad = None if gradient_OI is None else gradient_OI * mask_OI
        for group in self._adam.param_groups:
            group["lr"] = group["size"] * self._method.lr_at(self._step, self._steps)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._step += 1
        return value


def _size(weight_OI: Tensor, mask_OI: Tensor) -> float:
    """Root mean square of the kept weights."""
    return float((weight_OI.square().sum(dtype=torch.float64) / mask_OI.sum().clamp_min(1)).sqrt())


METHOD = Reconstruct
