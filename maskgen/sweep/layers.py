"""One layer of a sweep: solved by a one-shot method, kept as it was given, or corrected.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.core import int4
from maskgen.core.errors import DataError, NumericalError, PatternError
from maskgen.core.layout import LayerForm
from maskgen.core.mask import pack_bits
from maskgen.core.packed import Correction, PackedTensor, StoredLayer
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, INT4
from maskgen.hf import blocks
from maskgen.methods import LocalMethod
from maskgen.numerics.grid import round_to_grid
from maskgen.numerics.statistics import Gram

Correct = Callable[[Tensor, Tensor, Any], Correction]


def solve_layer(
    method: LocalMethod,
    weight_OI: Tensor,
    stats: Any,
    form: LayerForm,
    dtype: torch.dtype,
    name: str,
    prior_OI: Tensor | None = None,
) -> StoredLayer:
    """Solve one float32 weight, round the result to `dtype`, or to the codes of `form`, and pack it (on the CPU), with
    the method's correction beside what is stored, if it has one.

    Weights the method did not change come out bit for bit as they were, if they are no codes. Raises `NumericalError`
    naming the layer.
    """
    packed = _packed(method, weight_OI, stats, form, dtype, name, prior_OI)
    if method.correction is None:
        return StoredLayer(packed)
    return correct_layer(method.correct, weight_OI, packed, stats, dtype, name)


def _packed(
    method: LocalMethod,
    weight_OI: Tensor,
    stats: Any,
    form: LayerForm,
    dtype: torch.dtype,
    name: str,
    prior_OI: Tensor | None,
) -> PackedTensor:
    blocks.check_finite(weight_OI, f"{name}: weight")
    try:
        solution = method.solve(weight_OI, stats, form.pattern, prior_OI)
        solved_OI = weight_OI if solution.weight is None else solution.weight
        if form.values == INT4:
            assert isinstance(stats, Gram)
            return _coded(solved_OI, solution.mask, stats, form, name)
    except (PatternError, NumericalError) as error:
        raise NumericalError(f"{name}: {error}") from error
    packed = PackedTensor.pack(solved_OI.to("cpu", dtype), solution.mask.cpu(), form.pattern, name)
    return packed if form.values == FLOAT else packed.quantised(form.values)


def _coded(weight_OI: Tensor, mask_OI: Tensor, stats: Gram, form: LayerForm, name: str) -> PackedTensor:
    """The kept weights as int4 codes. Scales are chosen for them alone, by how large the inputs are; the codes, for the
    outputs of the layer."""
    rows, kept = weight_OI.shape[0], form.pattern.kept_columns(weight_OI.shape[1])
    int4.check_even(kept, name)
    blocks.check_finite(weight_OI, f"{name}: weight")
    size_OI = stats.sum_II.diagonal().expand_as(weight_OI)
    scale = int4.fit_scales(weight_OI[mask_OI].view(rows, kept), form.group, size_OI[mask_OI].view(rows, kept))
    step_OI = torch.ones_like(weight_OI).masked_scatter_(mask_OI, int4.spread(scale, kept))
    codes_OI = round_to_grid(weight_OI, mask_OI, step_OI, stats.sum_II, int4.nearest)
    octets = int4.pack_nibbles(codes_OI[mask_OI].view(rows, kept).to(torch.int8))
    return PackedTensor(octets.cpu(), pack_bits(mask_OI.cpu()), form.pattern, scale.cpu())


def correct_layer(
    correct: Correct, weight_OI: Tensor, packed: PackedTensor, stats: Any, dtype: torch.dtype, name: str
) -> StoredLayer:
    """A layer that is stored as `packed` already, with the correction that `correct` makes of its dense weight, the one
    that is served and `stats`, rounded to `dtype` (on the CPU).

    `weight_OI` is its dense float32 weight. Raises `NumericalError` naming the layer, also for a correction that has no
    finite value in `dtype`, and `DataError` for a packed weight of another shape.
    """
    blocks.check_finite(weight_OI, f"{name}: weight")
    if packed.shape != tuple(weight_OI.shape):
        raise DataError(
            f"{name}: the sparse weight is {packed.shape}, the dense one {tuple(weight_OI.shape)}; the checkpoint was "
            "not made from this model"
        )
    try:
        correction = correct(weight_OI, packed.unpack().to(weight_OI), stats).to(dtype)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from error
    if not correction.is_finite:
        raise NumericalError(f"{name}: the correction holds NaN or infinity in {dtype}")
    return StoredLayer(packed, correction)


def check_prior(prior: Callable[[str], Tensor], layers: Mapping[str, nn.Linear], pattern: NMPattern) -> None:
    """`DataError` unless there is a mask of this pattern and of the right shape for every one of `layers`."""
    for name, linear in layers.items():
        try:
            mask_OI = prior(name)
            if mask_OI.shape != linear.weight.shape:
                raise DataError(
                    f"prior mask of {name}: shape {tuple(mask_OI.shape)}, the layer has {tuple(linear.weight.shape)}; "
                    "these masks are of another model"
                )
            pattern.check_mask(mask_OI, f"prior mask of {name}")
        except KeyError:
            raise DataError(f"the prior has no mask for {name}; keep this layer dense with ignore") from None
        except PatternError as error:
            raise DataError(str(error)) from None
