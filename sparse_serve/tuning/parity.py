"""How far the kernels of a served layer are from the exact product, with every number of tokens that they serve.

The layer's own tensors, as prepared for serving, are given random inputs, and the product of the stored form in float64
is what they should give. Each bucket of tokens is tried at both of its ends, as a kernel takes other ways for few
tokens and for many.

How much rounding can explain follows from the arithmetic. A kernel may round the products' sums to float32, K times for
a row of K kept weights (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 3.1; with the unit of
hardware that cuts off instead of rounding), then the result to the layer's dtype; values that are codes may be rounded
to that dtype, too:

    |y - exact|  <=  gamma |w| |x|  +  u |exact|  (+ u |w| |x| for codes),     gamma = K e / (1 - K e)

with e = 2^-23, u half a unit of the dtype, and |w| |x| the product of Euclidean norms, which is no less than the sum of
the products' magnitudes (Cauchy and Schwarz). More than that is no rounding: a wrong weight, index or tile. Of a kernel
that rounds its inputs, the exact product is that of the rounded ones, which it says (`kernels.multiplied`).

Where the wrong outputs come from is found with inputs that are zero but for a few columns.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.values import FLOAT
from sparse_serve.kernels import LinearSpec
from sparse_serve.tuning.dispatch import Bound
from sparse_serve.tuning.parity_file import KernelParity
from sparse_serve.tuning.samples import random_input
from sparse_serve.tuning.selection import Choice, buckets_of

PROBED_COLUMNS = 16
"""Inputs that are looked at together: the finest answer to where an error comes from."""

_TILE_BYTES = 8 << 20
"""Of exact weight, or of exact outputs, at a time: little beside the model, whose memory is measured too."""

Linear = Callable[[Tensor], Tensor]
"""x `[T, I]` -> y `[T, O]`."""


@dataclass
class _Worst:
    """The worst output of a call so far, and which outputs and tokens have wrong ones."""

    wrong_O: Tensor
    wrong_T: Tensor
    ratio: float = -1.0
    row: int = 0
    error: float = 0.0
    allowed: float = 1.0

    def update(self, y_TO: Tensor, exact_TO: Tensor, allowed_TO: Tensor, first_row: int) -> None:
        difference = (y_TO.double() - exact_TO).abs().nan_to_num(nan=torch.inf)
        ratio_TO = difference / allowed_TO
        self.wrong_O[first_row : first_row + ratio_TO.shape[1]] = (ratio_TO > 1).any(0)
        self.wrong_T |= (ratio_TO > 1).any(1)
        at = int(ratio_TO.argmax())
        if ratio_TO.flatten()[at] > self.ratio:
            self.ratio, self.row = float(ratio_TO.flatten()[at]), first_row + at % ratio_TO.shape[1]
            self.error, self.allowed = float(difference.flatten()[at]), float(allowed_TO.flatten()[at])


def compare(
    layer: str, choice: Choice, bound: Bound, tensors: Mapping[str, Tensor], packed: PackedTensor, bias_O: Tensor | None
) -> list[KernelParity]:
    """A result for each bucket of tokens. `tensors` are what `choice.plan` prepared of `packed`."""
    spec = choice.spec
    limits = [bucket.tokens for bucket in choice.buckets] or list(buckets_of(spec.device_type))
    x_TI = random_input(spec, limits[-1])
    counts = sorted({count for before, last in pairwise([0, *limits]) for count in (before + 1, last)})
    with torch.inference_mode():
        outputs = {count: bound.linear(x_TI[:count], tensors, bias_O, spec.out_features) for count in counts}
        found: dict[int, _Worst] = {}
        for kernel in choice.plan.kernels:
            served = {count: y_TO for count, y_TO in outputs.items() if choice.plan.kernel_for(count) == kernel}
            if served:
                exact_x = choice.plan.multiplied(max(served), x_TI[: max(served)])
                found |= _worst(spec, packed, exact_x, bias_O, served)
        results = []
        for before, last in pairwise([0, *limits]):
            at = max({before + 1, last}, key=lambda count: found[count].ratio)
            worst, rows, columns = found[at], None, None
            if worst.ratio > 1:
                rows = _run_around(worst.wrong_O, worst.row)

                def linear(x_TI: Tensor) -> Tensor:
                    return bound.linear(x_TI, tensors, None, spec.out_features)

                exact_inputs = partial(choice.plan.multiplied, at)
                columns = _columns(spec, packed, linear, exact_inputs, worst.wrong_T, rows)
            kernel = choice.plan.kernel_for(at)
            results.append(KernelParity(layer, kernel, before + 1, last, at, worst.error, worst.allowed, rows, columns))
    return results


def _worst(
    spec: LinearSpec, packed: PackedTensor, exact_x: Tensor, bias_O: Tensor | None, outputs: Mapping[int, Tensor]
) -> dict[int, _Worst]:
    """The worst output of every call, by its number of tokens; exact products are made some rows at a time."""
    none = partial(torch.zeros, dtype=torch.bool, device=exact_x.device)
    found = {count: _Worst(none(spec.out_features), none(count)) for count in outputs}
    step = max(1, _TILE_BYTES // (8 * max(exact_x.shape)))
    for first in range(0, spec.out_features, step):
        rows = slice(first, min(first + step, spec.out_features))
        bias = None if bias_O is None else bias_O[rows].double()
        exact_TO, allowed_TO = _exact(spec, exact_x, _dense(packed, rows), bias)
        for count, y_TO in outputs.items():
            found[count].update(y_TO[:, rows], exact_TO[:count], allowed_TO[:count], first)
    return found


def _exact(spec: LinearSpec, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The exact product `[T, O]`, and how far from it rounding can lead. All are float64."""
    exact_TO = x_TI @ weight_OI.T
    size_TO = x_TI.norm(dim=1)[:, None] * weight_OI.norm(dim=1)[None, :]
    if bias_O is not None:
        exact_TO, size_TO = exact_TO + bias_O, size_TO + bias_O.abs()
    unit, kept = torch.finfo(spec.dtype), spec.pattern.kept_columns(spec.in_features)
    steps = (kept + 2) * torch.finfo(torch.float32).eps  # a bias or a scale is a step, too
    codes = 0.0 if spec.values == FLOAT else unit.eps / 2
    allowed_TO = (steps / (1 - steps) + codes) * size_TO + unit.eps / 2 * exact_TO.abs() + unit.tiny
    return exact_TO, allowed_TO


def _dense(packed: PackedTensor, rows: slice) -> Tensor:
    scale = None if packed.scale is None else packed.scale[rows]
    return PackedTensor(packed.values[rows], packed.bitmask[rows], packed.pattern, scale).unpack().double()


def _columns(
    spec: LinearSpec,
    packed: PackedTensor,
    linear: Linear,
    exact_inputs: Callable[[Tensor], Tensor],
    wrong_T: Tensor,
    rows: tuple[int, int],
) -> tuple[int, int] | None:
    """The first and last input that alone lead to wrong outputs among `rows`; None if none does.

    Each token that had a wrong output gets other inputs that are not zero, so a call looks at as many places.
    """
    chosen, slots = slice(rows[0], rows[1] + 1), wrong_T.nonzero().flatten()
    weight_OI, x_TI = _dense(packed, chosen), random_input(spec, len(wrong_T))
    if linear(torch.zeros_like(x_TI))[:, chosen].any():
        return None
    blocks = -(-spec.in_features // PROBED_COLUMNS)
    block_I = torch.arange(spec.in_features, device=x_TI.device) // PROBED_COLUMNS
    ratios = []
    for first in range(0, blocks, len(slots)):
        block_T = torch.full_like(wrong_T, -1, dtype=torch.long)
        block_T[slots] = torch.arange(first, first + len(slots), device=x_TI.device)
        probe_TI = x_TI * (block_I == block_T[:, None])
        exact_TO, allowed_TO = _exact(spec, exact_inputs(probe_TI), weight_OI)
        difference = (linear(probe_TI)[:, chosen].double() - exact_TO).abs().nan_to_num(nan=torch.inf)
        ratios.append((difference / allowed_TO).amax(1)[slots])
    ratio_B = torch.cat(ratios)[:blocks]
    worst = int(ratio_B.argmax())
    if ratio_B[worst] <= 1:
        return None
    low, high = _run_around(ratio_B > 1, worst)
    return low * PROBED_COLUMNS, min((high + 1) * PROBED_COLUMNS, spec.in_features) - 1


def _run_around(wrong: Tensor, at: int) -> tuple[int, int]:
    """First and last of the neighbours of `at` that are all True."""
    flags = wrong.tolist()
    low = high = at
    while low > 0 and flags[low - 1]:
        low -= 1
    while high + 1 < len(flags) and flags[high + 1]:
        high += 1
    return low, high
