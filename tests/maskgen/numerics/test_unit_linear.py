"""The layer that all structured methods share."""

from __future__ import annotations

import torch
from torch import nn

from maskgen.numerics.unit_linear import UnitLinear, add_taylor


class Layer(UnitLinear):
    """The mix-in with what it is mixed into."""

    def __init__(self, sites: int | None, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        linear = nn.Linear(12, 5)
        self.weight, self.bias = nn.Parameter(linear.weight.to(dtype), requires_grad=False), linear.bias
        self.add_units(sites, rank, torch.Generator().manual_seed(0))
        if rank:
            nn.init.normal_(self.b_OR)  # type: ignore[arg-type]


def test_the_merged_weight_is_the_trained_layer_with_units_gone() -> None:
    torch.manual_seed(0)
    layer, x = Layer(4, rank=2), torch.randn(7, 12)
    with torch.no_grad():
        layer.mask_U.copy_(torch.tensor([0.5, -2.0, 0.0, 1.5]))
        layer.keep.fill_(3)
    torch.testing.assert_close(layer.train_forward(x), layer.hard_forward(x))
    assert layer.mask().sum(0).tolist() == [5] * 6 + [0] * 3 + [5] * 3
    layer.keep.fill_(2)
    assert layer.kept_U().tolist() == [False, True, False, True], "by size, whatever the sign"
    assert not layer.merged()[:, ~layer.mask()[0]].any()


def test_the_merged_weight_is_what_can_be_stored() -> None:
    layer = Layer(None, rank=2, dtype=torch.bfloat16)
    merged_OI = layer.merged()
    assert merged_OI.dtype is torch.float32
    assert torch.equal(merged_OI, merged_OI.bfloat16().float())
    assert layer.mask().all()


def test_taylor_scores_add_up_over_steps() -> None:
    torch.manual_seed(0)
    layer, plain = Layer(4, rank=0), Layer(None, rank=0)
    wanted_U = torch.zeros(4)
    for _ in range(3):
        layer.mask_U.grad = torch.randn(4)
        wanted_U += layer.mask_U.grad**2
        add_taylor({"a.down_proj": layer, "a.up_proj": plain})
    torch.testing.assert_close(layer.importance_U, wanted_U)
