"""The dense control: it trains a plain linear layer by AdamW, prunes nothing, and says that its result is dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import Mode, Result, StepContext, TargetLayer
from maskgen.methods.learned.dense_control import DenseControl


def test_it_is_plain_adamw_on_the_dense_layer() -> None:
    method = DenseControl(weight_decay=0.1)
    linear, norm = nn.Linear(16, 8), nn.Parameter(torch.ones(16))
    twin, twin_norm = nn.Linear(16, 8), nn.Parameter(torch.ones(16))
    twin.load_state_dict(linear.state_dict())
    linear.requires_grad_(False)
    layer = method.attach(TargetLayer(0, "a", linear, NMPattern(2, 4)), torch.Generator())
    assert layer is not None
    layers = {"a": layer}
    optimizer = method.optimizer(layers, [norm], 1e-2)
    peer = torch.optim.AdamW(
        [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin_norm], "weight_decay": 0.0}], 1e-2,
        betas=(0.9, 0.95),
    )  # fmt: skip
    for step in range(5):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
        method.before_step(layers, StepContext(step, 5))
        layer(x * norm).square().mean().backward()
        twin(x * twin_norm).square().mean().backward()
        for each in (optimizer, peer):
            each.step()
            each.zero_grad()
        method.after_step(layers, StepContext(step, 5), 1e-2)
        twin.bias.grad = None
    assert torch.equal(layer.weight, twin.weight) and torch.equal(norm, twin_norm)
    assert not torch.equal(norm, torch.ones(16))
    for mode in (Mode.HARD, Mode.DENSE):
        layer.mode = mode
        assert torch.equal(layer(x), twin(x))


def test_the_answer_is_dense_and_says_so() -> None:
    method = DenseControl()
    assert (method.result, method.trains_weights, method.uses_prior) == (Result.DENSE, True, False)
    layer = method.attach(TargetLayer(0, "a", nn.Linear(16, 8), NMPattern(2, 4)), torch.Generator())
    assert layer is not None
    solution = layer.solution()
    assert solution.weight is not None and torch.equal(solution.weight, layer.weight)
    assert not solution.weight.requires_grad and solution.correction is None
    assert solution.mask.dtype == torch.bool and solution.mask.shape == (8, 16) and solution.mask.all()


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf")])
def test_options_out_of_range_are_refused(weight_decay: float) -> None:
    with pytest.raises(RecipeError, match=r"method\.weight_decay"):
        DenseControl(weight_decay=weight_decay)
