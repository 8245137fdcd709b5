"""What learned methods minimise: next-token cross-entropy mixed with distillation from the dense model.

    L = (1 - a) CE(student) + a T^2 KL(teacher || student),    both averaged over predicted tokens, in nats

The teacher is the model itself before any sparsity. When its weights are frozen that is the same tensors with every
`LearnedLinear` in DENSE mode, so distillation costs one more forward pass and no weight memory; when weights are
trained it is a frozen copy. Padding does not occur: training windows are packed.

Logits are the widest tensors of a language model, so losses are taken over slices of tokens whose float32 copies are
recomputed in the backward pass: beside the logits themselves, one slice exists at a time.

Sources: AST (Huang et al., AAAI 2025) for the mix; Hinton et al. 2015 for T^2.

Legend: B = batch, T = tokens, V = vocabulary, N = tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad
from torch.utils.checkpoint import checkpoint

from maskgen.learned import LearnedLinear, Mode

SLICE_BYTES = 64 << 20
"""Float32 bytes of one slice of logits."""

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

    `teacher` None means that the student's own frozen weights teach, through `layers`.
    """

    layers: Mapping[str, LearnedLinear]
    weight: float
    temperature: float
    compute_dtype: torch.dtype
    teacher: nn.Module | None = None

    def __call__(self, student: nn.Module, ids_BT: Tensor) -> Loss:
        """The loss of windows `[B, T]` (T - 1 predicted tokens each), averaged over all of them."""
        teacher_BTV = self._teach(student, ids_BT) if self.weight > 0 else None
        student_BTV = self._logits(student, ids_BT)
        ce = divergence = student_BTV.new_zeros((), dtype=torch.float32)
        tokens = ids_BT[:, 1:].numel()
        rows = max(1, SLICE_BYTES // (4 * student_BTV.shape[-1]))
        targets = pad(ids_BT[:, 1:], (0, 1), value=NO_TARGET).flatten().split(rows)
        students = student_BTV.flatten(0, 1).split(rows)
        teachers = [None] * len(targets) if teacher_BTV is None else teacher_BTV.flatten(0, 1).split(rows)
        for student_NV, teacher_NV, target_N in zip(students, teachers, targets, strict=True):
            parts = checkpoint(
                slice_losses, student_NV, teacher_NV, target_N, self.temperature, use_reentrant=False,
                preserve_rng_state=False,
            )  # fmt: skip
            ce, divergence = ce + parts[0] / tokens, divergence + parts[1] / tokens
        total = (1 - self.weight) * ce + self.weight * divergence
        return Loss(total, float(ce.detach()), float(divergence.detach()))

    @torch.no_grad()
    def _teach(self, student: nn.Module, ids_BT: Tensor) -> Tensor:
        if self.teacher is not None:
            return self._logits(self.teacher, ids_BT)
        with in_mode(self.layers, Mode.DENSE):
            return self._logits(student, ids_BT)

    def _logits(self, model: nn.Module, ids_BT: Tensor) -> Tensor:
        """Logits `[B, T, V]`, in the dtype they are computed in."""
        with autocast(ids_BT.device, self.compute_dtype):
            logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV


def slice_losses(
    student_NV: Tensor, teacher_NV: Tensor | None, target_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sums over N tokens: cross-entropy, and T^2 KL(teacher || student) (0 without a teacher), in float32.

    Tokens whose target is `NO_TARGET` do not count.
    """
    student_NV = student_NV.float()
    ce = cross_entropy(student_NV, target_N, ignore_index=NO_TARGET, reduction="sum")
    if teacher_NV is None:
        return ce, torch.zeros_like(ce)
    expected_NV = log_softmax(teacher_NV.float() / temperature, -1)
    found_NV = log_softmax(student_NV / temperature, -1)
    divergence_N = kl_div(found_NV, expected_NV, log_target=True, reduction="none").sum(-1)
    return ce, divergence_N.masked_fill(target_N == NO_TARGET, 0).sum() * temperature**2


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
