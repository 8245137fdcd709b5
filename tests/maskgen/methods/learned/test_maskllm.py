"""MaskLLM's layers, their gradients, the prior and the schedules, each against its definition.

Legend: O = out features, I = in features, G = groups per row, m = columns per group, P = patterns, T = tokens.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import create
from maskgen.methods.learned import Mode, StepContext, TargetLayer
from maskgen.methods.learned.maskllm import MaskLLM, MaskLLMLinear, SoftLinear
from maskgen.numerics import memory
from maskgen.numerics.mask_sample import MaskSample
from tests.maskgen.numerics.test_mask_sample import (
    TWO_FOUR,
    draw,
    each_form,
    each_pattern,
    generator,
    logits_of,
)


def layer(seed: int = 0, out: int = 6, inputs: int = 16, prior: Tensor | None = None, **options: Any) -> MaskLLMLinear:
    linear = nn.Linear(inputs, out, dtype=options.pop("dtype", torch.float32))
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out, inputs, generator=generator(seed)))
        linear.bias.copy_(torch.randn(out, generator=generator(seed + 1)))
    linear.requires_grad_(False)
    made = MaskLLM(**options).attach(TargetLayer(3, "up", linear, TWO_FOUR, prior), generator(seed))
    assert isinstance(made, MaskLLMLinear)
    return made


@each_form
def test_chunks_do_not_change_the_layer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_OLG = logits_of(form, TWO_FOUR, rows=7)
    whole = [noise for _, noise in draw(form).chunks(logits_OLG)]
    monkeypatch.setitem(memory.ELEMENTS, "cpu", 60)
    parts = list(draw(form).chunks(logits_OLG))
    assert len(whole) == 1 and len(parts) > 2
    assert torch.cat([torch.arange(7)[rows] for rows, _ in parts]).tolist() == list(range(7))


def naive(x: Tensor, logits_OLG: Tensor, weight_OI: Tensor, one: MaskSample) -> tuple[Tensor, Tensor]:
    """The formulas as they stand, with everything kept for autograd."""
    noise = torch.cat([noise for _, noise in one.chunks(logits_OLG)])
    patterns_Pm = one.patterns_Pm
    if one.form == "reservoir":
        keys = (one.scale * logits_OLG + noise) / one.temperature
        mu1 = torch.softmax(keys, 1)
        mu2 = torch.softmax(keys + torch.log(1 - mu1) / one.temperature, 1)
        mask_OGm = (mu1 + mu2).permute(0, 2, 1)
    else:
        if one.form == "additive":
            logits_OLG = torch.einsum("omg,pm->opg", logits_OLG, patterns_Pm)
        y_OPG = torch.softmax((one.scale * logits_OLG + noise) / one.temperature, 1)
        mask_OGm = torch.einsum("opg,pm->ogm", y_OPG, patterns_Pm)
    masked_OI = weight_OI * mask_OGm.flatten(1)
    return x @ masked_OI.T, masked_OI.square().sum()


@each_form
def test_output_and_gradients_equal_plain_autograd(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.ELEMENTS, "cpu", 60)
    weight_OI = torch.randn(5, 20, generator=generator(2), dtype=torch.float64)
    direction = torch.randn(2, 3, 5, generator=generator(3), dtype=torch.float64)
    results = []
    for function in (SoftLinear.apply, naive):
        x = torch.randn(2, 3, 20, generator=generator(4), dtype=torch.float64).requires_grad_()
        logits = logits_of(form, TWO_FOUR, rows=5).requires_grad_()
        y, energy = function(x, logits, weight_OI, draw(form, scale=3.0, temperature=0.7))
        ((y * direction).sum() + 0.3 * energy).backward()
        results.append((y.detach(), energy.detach(), x.grad, logits.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@each_form
@each_pattern
def test_gradients_equal_finite_differences(form: str, pattern: NMPattern) -> None:
    x = torch.randn(3, 2 * pattern.m, generator=generator(), dtype=torch.float64).requires_grad_()
    weight_OI = torch.randn(2, 2 * pattern.m, generator=generator(1), dtype=torch.float64)
    logits = logits_of(form, pattern, 2, 2).requires_grad_()
    one = draw(form, pattern, scale=2.0, temperature=1.5)
    assert torch.autograd.gradcheck(lambda x, logits: SoftLinear.apply(x, logits, weight_OI, one), (x, logits))


@each_form
def test_weights_get_no_gradient_and_logits_do(form: str) -> None:
    one = layer(logits=form)
    x = torch.randn(4, 16, generator=generator()).requires_grad_()
    one(x).square().sum().backward()
    assert one.weight.grad is None and one.bias.grad is None
    assert one.logits.grad is not None and one.logits.grad.abs().min() > 0
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_products_follow_autocast_and_gradients_come_back_in_their_own_dtype() -> None:
    one = layer(dtype=torch.bfloat16)
    x = torch.randn(4, 16, generator=generator()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = one(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert one.logits.grad is not None and one.logits.grad.dtype == torch.float32
    noise = next(one.sample().chunks(one.logits))[1]
    masked_OI = one.weight.float() * one.sample().mask(one.logits.detach(), noise)
    expected = torch.nn.functional.linear(x.detach().bfloat16(), masked_OI.bfloat16(), one.bias)
    torch.testing.assert_close(y.detach(), expected)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert one(x).dtype == torch.float32


@each_form
def test_nothing_but_the_inputs_is_kept_for_the_backward_pass(form: str) -> None:
    one = layer(logits=form)
    x = torch.randn(4, 16, generator=generator()).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = one(x)
    assert [tensor.data_ptr() for tensor in kept] == [value.data_ptr() for value in (x, one.logits, one.weight)]
    y.sum().backward()


def test_recomputation_sees_the_same_noise() -> None:
    x = torch.randn(4, 16, generator=generator()).requires_grad_()
    gradients = []
    for wrapped in (False, True):
        one = layer()
        one.context = StepContext(2, 10, 77)
        y = checkpoint(one, x, use_reentrant=False) if wrapped else one(x)
        penalty = MaskLLM().regulariser({"up": one}, one.context)
        (y.square().sum() + penalty).backward()
        gradients.append(one.logits.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_backward_pass_leaves_no_graph_behind(wrapped: bool, reward: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass, recomputed ones included, has its own `MaskSample`, which lives as long as the graph of the pass."""
    one, x = layer(weight_reward=reward), torch.randn(4, 16, generator=generator()).requires_grad_()
    draws, make = [], one.sample
    monkeypatch.setattr(one, "sample", lambda: (draws.append(weakref.ref(made := make())), made)[1])
    for passes in (1, 2):
        block = nn.Sequential(one, nn.GELU())  # recomputation stops at the last tensor that is needed
        y = checkpoint(block, x, use_reentrant=False) if wrapped else block(x)
        penalty = one.method.regulariser({"up": one}, one.context)
        (y.sum() + (penalty or 0)).backward()
        del block, y, penalty
        gc.collect()
        assert len(draws) == passes * (1 + wrapped) and not any(draw() for draw in draws)


def test_the_backward_pass_belongs_to_the_moment_of_its_forward_pass() -> None:
    x = torch.randn(4, 16, generator=generator())
    one, other = layer(), layer()
    y, expected = one(x), other(x)
    one.context = StepContext(5, 10, 123)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(one.logits.grad, other.logits.grad)


def test_noise_differs_by_seed_and_by_layer() -> None:
    x = torch.randn(4, 16, generator=generator())
    one, other = layer(), layer()
    other.index = 4
    first = one(x)
    assert torch.equal(first, one(x)) and not torch.equal(first, other(x))
    one.context = StepContext(0, 1, 99)
    assert not torch.equal(first, one(x))


def test_the_exported_layer_is_the_evaluated_one() -> None:
    one = layer(init_noise=True)
    x = torch.randn(4, 16, generator=generator())
    one.mode = Mode.HARD
    mask_OI = one.mask()
    TWO_FOUR.check_mask(mask_OI)
    expected = torch.nn.functional.linear(x, one.weight * mask_OI, one.bias)
    assert torch.equal(one(x), expected) and torch.equal(one(x), one(x))
    assert torch.equal(one.solution().mask, mask_OI) and one.solution().weight is None
    assert torch.equal((one.weight * mask_OI)[mask_OI], one.weight[mask_OI])


@each_form
def test_ties_go_to_the_first_pattern(form: str) -> None:
    mask_OI = layer(logits=form, prior_strength=0.0).mask()
    assert mask_OI.tolist() == [[True, True, False, False] * 4] * 6


def test_create_builds_it() -> None:
    assert create("maskllm", {"logits": "additive", "anneal": 1}) == MaskLLM(logits="additive", anneal=1.0)
    with pytest.raises(RecipeError, match="no such option"):
        create("maskllm", {"alpha": 1})
