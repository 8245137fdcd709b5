"""What learned methods minimise: next-token cross-entropy mixed with distillation from the dense model.

    L = (1 - a) CE(student) + a T^2 KL(teacher || student),    both averaged over predicted tokens, in nats

The teacher is the model itself before any sparsity. When its weights are frozen that is the same tensors with every
`LearnedLinear` in DENSE mode, so distillation costs one more forward pass and no weight memory; when weights are
trained it is a frozen copy. Padding does not occur: training windows are packed.

Logits are the widest tensors of a language model, so nothing of their size is kept beside them: the loss and its
gradient are computed in one pass over slices of tokens, in float32, and the gradient is written over the teacher's
logits, which nobody needs afterwards. With p = softmax(s), of student logits s, and p^T, q^T at temperature T,

    dL/ds = (1 - a) (p - onehot(target)) + a T (p^T - q^T)          (T^2 KL has 1/T of it from the temperature)

Sources: AST (Huang et al., AAAI 2025) for the mix; Hinton et al. 2015 for T^2.

Legend: B = batch, T = tokens, V = vocabulary, M = B T, N = tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from maskgen.methods.learned import LearnedLinear, Mode
from maskgen.numerics.memory import chunk_elements

SliceLosses = Callable[[Tensor, Tensor | None, Tensor, float, float], tuple[Tensor, Tensor, Tensor]]
"""The signature of `slice_losses`."""

WeightedLosses = Callable[[Tensor, Tensor | None, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]
"""The signature of `weighted_losses`."""

NO_TARGET = -100
"""The target of a window's last token, whose successor is not known. Cutting it off would copy all logits."""


@dataclass(frozen=True)
class Loss:
    """`total` is differentiable; `cross_entropy` and `divergence` are its parts, in nats per token."""

    total: Tensor
    cross_entropy: float
    divergence: float


@dataclass(frozen=True)
class Objective:
    """The mixed loss of a student, `weight` a in [0, 1] and `temperature` T > 0.

    `teacher` None means that the student's own frozen weights teach, through `layers`. `losses` is `slice_losses`, or
    that compiled.
    """

    layers: Mapping[str, LearnedLinear]
    weight: float
    temperature: float
    compute_dtype: torch.dtype
    teacher: nn.Module | None = None
    losses: SliceLosses | None = None

    def __call__(self, student: nn.Module, ids_BT: Tensor) -> Loss:
        """The loss of windows `[B, T]` (T - 1 predicted tokens each), averaged over all of them."""
        teacher_BTV = self._teach(student, ids_BT) if self.weight > 0 else None
        student_BTV = self.logits(student, ids_BT)
        target_BT = pad(ids_BT[:, 1:], (0, 1), value=NO_TARGET)
        losses = self.losses or slice_losses
        mixed = MixedLoss.apply(student_BTV, teacher_BTV, target_BT, self.weight, self.temperature, losses)
        total, ce, divergence = mixed
        return Loss(total, float(ce), float(divergence))

    @torch.no_grad()
    def _teach(self, student: nn.Module, ids_BT: Tensor) -> Tensor:
        if self.teacher is not None:
            return self.logits(self.teacher, ids_BT)
        with in_mode(self.layers, Mode.DENSE):
            return self.logits(student, ids_BT)

    def logits(self, model: nn.Module, ids_BT: Tensor) -> Tensor:
        """Logits `[B, T, V]`, in the dtype they are computed in."""
        with autocast(ids_BT.device, self.compute_dtype):
            logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV


class MixedLoss(torch.autograd.Function):
    """(student logits, teacher logits or None, targets) -> the mixed loss, differentiable, and its parts.

    Logits `[B, T, V]`; targets `[B, T]`, at least one of them not `NO_TARGET`. The teacher's logits are overwritten,
    and backward works once. `losses` computes those of a slice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_BTV: Tensor,
        teacher_BTV: Tensor | None,
        target_BT: Tensor,
        weight: float,
        temperature: float,
        losses: SliceLosses,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student_MV, target_M = student_BTV.flatten(0, 1), target_BT.flatten()
        if teacher_BTV is not None:
            gradient_MV = teacher_BTV.flatten(0, 1)
        else:
            gradient_MV = torch.empty_like(student_MV) if ctx.needs_input_grad[0] else student_MV
        share = 1 / int((target_M != NO_TARGET).sum())
        rows = max(1, chunk_elements(student_MV.device) // student_MV.shape[1])
        parts = student_MV.new_zeros(2, dtype=torch.float32)
        for slices in zip(*(whole.split(rows) for whole in (student_MV, gradient_MV, target_M)), strict=True):
            student_NV, gradient_NV, target_N = slices
            teacher_NV = None if teacher_BTV is None else gradient_NV
            ce, divergence, slice_NV = losses(student_NV, teacher_NV, target_N, weight, temperature)
            parts += torch.stack([ce, divergence]) * share
            if ctx.needs_input_grad[0]:
                gradient_NV.copy_(slice_NV.mul_(share))
        ctx.gradient_BTV = gradient_MV.view_as(student_BTV)
        ce, divergence = parts
        total = (1 - weight) * ce + weight * divergence
        ctx.mark_non_differentiable(ce, divergence)
        return total, ce, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient_BTV, ctx.gradient_BTV = ctx.gradient_BTV, None
        return gradient_BTV.mul_(grads[0]), None, None, None, None, None


def slice_losses(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    target_N: Tensor,
    weight: float,
    temperature: float,
    weighted: WeightedLosses | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of N tokens: summed cross-entropy, T^2 KL (0 without a teacher), and dL/ds `[N, V]` of L, in float32.

    Tokens whose target is `NO_TARGET` do not count. `weighted` is `weighted_losses`, or that compiled.
    """
    factors = [1 - weight, weight * temperature, temperature, temperature**2]
    factors_4 = torch.tensor(factors, dtype=torch.float32, device=student_NV.device)
    return (weighted or weighted_losses)(student_NV, teacher_NV, target_N, factors_4, temperature == 1)


def weighted_losses(
    student_NV: Tensor, teacher_NV: Tensor | None, target_N: Tensor, factors_4: Tensor, at_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`slice_losses` with its numbers in a tensor: 1 - a, a T, T and T^2; `at_one` says that T is 1.

    They are no floats of Python's: of those, torch's compiler writes some into its code as they are at first, and its
    cache on disk gives that code to runs with other ones (https://github.com/pytorch/pytorch/issues/194976).
    """
    keep, pull, temperature, square = factors_4
    counts_N1, target_N1 = (target_N != NO_TARGET)[:, None], target_N.clamp_min(0)[:, None]
    log_p_NV = log_softmax(student_NV.float(), -1)
    ce = -log_p_NV.gather(1, target_N1).where(counts_N1, 0).sum()
    p_NV = log_p_NV.exp()
    if teacher_NV is None:
        divergence, gradient_NV = torch.zeros_like(ce), p_NV.mul_(keep)
    else:
        log_found_NV = log_p_NV if at_one else log_softmax(student_NV.float() / temperature, -1)
        log_q_NV = log_softmax(teacher_NV.float() / temperature, -1)
        q_NV = log_q_NV.exp()
        gap_NV = (p_NV if at_one else log_found_NV.exp()) - q_NV
        divergence_N1 = q_NV.mul_(log_q_NV.sub_(log_found_NV)).sum(-1, keepdim=True)
        divergence = divergence_N1.where(counts_N1, 0).sum() * square
        gradient_NV = gap_NV.mul_(pull).add_(p_NV.mul_(keep))
    gradient_NV.scatter_add_(1, target_N1, -keep.expand_as(target_N1))
    return ce, divergence, gradient_NV.masked_fill_(~counts_N1, 0)


@contextmanager
def in_mode(layers: Mapping[str, LearnedLinear], mode: Mode) -> Iterator[None]:
    """Every layer in `mode`, and back to TRAIN afterwards."""
    for layer in layers.values():
        layer.mode = mode
    try:
        yield
    finally:
        for layer in layers.values():
            layer.mode = Mode.TRAIN


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; float32 switches the casting off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
