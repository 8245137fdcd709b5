"""What structured methods train: a mask for every unit and a low-rank adapter, over frozen linear layers.

        y = (W + B A)(m * x) + b

The masks m, one number per unit of a site (see `units`), stand before the layer that reads the units, so after training
they fold into its columns, and the adapter into its weight: the result is a plain linear layer, to be sliced.

Source: Hu et al., "LoRA", ICLR 2022 (the adapter).

Legend: U = units of a site, O = out features, I = in features, R = rank of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from maskgen.numerics.shards import full, local, rows_of
from maskgen.numerics.units import (
    Budget,
    LinearShape,
    ParameterCount,
    count_parameters,
    kind_of,
    resolve_widths,
    top_units,
)


class UnitLinear(nn.Module):
    """A frozen linear layer with unit masks and an adapter, which starts at 0.

    A mix-in for a class with `weight` and `bias`. `units` is 0 except at sites; only these have `mask_U` (m, one number
    per unit, spread over its columns), `keep` (how many units will stay, a whole number, saved with the run) and
    `importance_U` (by which units are ranked).
    `a_RI` and `b_OR` exist when `rank` > 0.
    """

    weight: Tensor
    bias: nn.Parameter
    units: int
    mask_U: nn.Parameter
    a_RI: nn.Parameter | None
    b_OR: nn.Parameter | None
    importance_U: Tensor
    keep: Tensor

    def add_units(self, units: int | None, rank: int, generator: torch.Generator) -> None:
        """Make masks (if `units`) and adapter (if `rank` > 0), on the device of the weight."""
        (rows, columns), device = self.weight.shape, self.weight.device
        self.a_RI = self.b_OR = None
        self.units = units or 0
        if units:
            self.mask_U = nn.Parameter(torch.ones(units, device=device))
            self.register_buffer("importance_U", torch.zeros(units, device=device))
            self.register_buffer("keep", torch.tensor(units, device=device))
        if rank:
            a_RI = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            self.a_RI = nn.Parameter(a_RI.to(device))
            self.b_OR = nn.Parameter(torch.zeros(rows, rank, device=device))

    def train_forward(self, x: Tensor) -> Tensor:
        """`[..., I] -> [..., O]`, differentiable in the masks and the adapter."""
        if self.units:
            x = x * self.per_column(self.mask_U).to(x.dtype)
        y = dense_linear(x, self.weight, self.bias)
        if self.a_RI is None or self.b_OR is None:
            return y
        return y + dense_linear(dense_linear(x, self.a_RI.to(x.dtype)), self.b_OR.to(x.dtype))

    def hard_forward(self, x: Tensor) -> Tensor:
        """The layer with all but the `keep` largest masks at zero, `[..., I] -> [..., O]`: what the sliced model
        computes."""
        return dense_linear(x, self.merged().to(self.weight.dtype), self.bias)

    def mask(self) -> Tensor:
        """Bool `[O, I]`: False in the columns of units that are removed."""
        kept_OI = torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        return kept_OI & self.per_column(self.kept_U()) if self.units else kept_OI

    def masks(self) -> Tensor:
        """The masks `[U]` of a site, gathered from all processes, without gradient."""
        return full(self.mask_U.detach())

    def set_masks(self, mask_U: Tensor) -> None:
        """Give the masks of a site new values `[U]`."""
        local(self.mask_U.detach()).copy_(rows_of(self.mask_U, mask_U))

    def kept_U(self) -> Tensor:
        """Bool `[U]`, for a site: the `keep` units with the largest masks."""
        return top_units(self.masks().abs(), int(self.keep))

    def merged(self) -> Tensor:
        """(W + B A) diag(kept * m), the weight to slice: float32 `[O, I]`, rounded to what the model stores."""
        weight_OI = full(self.weight.detach()).float()
        if self.a_RI is not None and self.b_OR is not None:
            weight_OI = weight_OI + full(self.b_OR.detach()) @ full(self.a_RI.detach())
        if self.units:
            weight_OI = weight_OI * self.per_column(self.masks() * self.kept_U())
        return weight_OI.to(self.weight.dtype).float()

    def per_column(self, value_U: Tensor) -> Tensor:
        """One value per unit `[U]` -> the same values for each of its columns `[I]`."""
        return value_U.repeat_interleave(self.weight.shape[1] // len(value_U))

    def shape(self) -> LinearShape:
        """Sizes of the layer, for `count_parameters`."""
        return LinearShape(self.weight.shape[0], self.weight.shape[1], self.bias is not None)


_Linear = TypeVar("_Linear", bound=UnitLinear)


def sites(layers: Mapping[str, _Linear]) -> dict[str, _Linear]:
    """Those of `layers` that have unit masks."""
    return {name: layer for name, layer in layers.items() if layer.units}


def parameter_count_of(layers: Mapping[str, UnitLinear]) -> ParameterCount:
    """`count_parameters` of layers that are being trained."""
    units = {name: layer.units for name, layer in sites(layers).items()}
    return count_parameters({name: layer.shape() for name, layer in layers.items()}, units)


def make_optimizer(
    layers: Mapping[str, UnitLinear],
    others: Sequence[nn.Parameter],
    lr: float,
    budget: Budget,
    on_gradients: Callable[[], None],
) -> torch.optim.Optimizer:
    """Adam on the adapters and on `others`; also sets `keep` of all sites to the widths of `budget`.

    Masks are among its parameters with a learning rate of 0, for their gradients only: the method changes them.
    `on_gradients` is called in every step when the gradients are complete and averaged over processes, before they are
    used.
    """
    keep = resolve_widths(parameter_count_of(layers), budget)
    for name, layer in sites(layers).items():
        layer.keep.fill_(keep[kind_of(name)])
    adapters = [part for layer in layers.values() for part in (layer.a_RI, layer.b_OR) if part is not None]
    groups = [
        {"params": [layer.mask_U for layer in sites(layers).values()], "lr": 0.0},
        {"params": [*adapters, *others], "lr": lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer.register_step_pre_hook(lambda *_: on_gradients())
    return optimizer


def add_taylor(layers: Mapping[str, UnitLinear]) -> None:
    """Add (m dL/dm)^2 of one step to `importance_U`: by how much removing a unit changes the loss, to first order.

    Squares are summed over steps, so units whose effect changes sign from batch to batch count too.
    """
    for layer in sites(layers).values():
        if layer.mask_U.grad is not None:
            layer.importance_U += (layer.masks() * full(layer.mask_U.grad)).square()
