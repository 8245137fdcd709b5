"""MaskLLM's sampled masks, their gradients, the prior and the schedules, each against its definition.

Legend: O = out features, I = in features, G = groups per row, m = columns per group, P = patterns, T = tokens.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import create
from maskgen.methods.learned import Mode, StepContext, TargetLayer
from maskgen.methods.learned.maskllm import FORMS, MaskLLM, MaskLLMLinear, MaskSample, SoftLinear
from maskgen.numerics import memory

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)]
TWO_FOUR = NMPattern(2, 4)
each_form = pytest.mark.parametrize("form", FORMS)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(form: str = "categorical", pattern: NMPattern = TWO_FOUR, seed: int = 0, **changes: float) -> MaskSample:
    values: dict[str, Any] = {"scale": 1.0, "temperature": 1.0, **changes}
    return MaskSample(form, pattern, pattern.candidates().double(), seed=seed, **values)


def logits_of(form: str, pattern: NMPattern, rows: int = 3, groups: int = 5, seed: int = 1) -> Tensor:
    planes = pattern.candidate_count if form == "categorical" else pattern.m
    return torch.randn(rows, planes, groups, generator=generator(seed), dtype=torch.float64)


def soft_mask(one: MaskSample, logits_OLG: Tensor) -> Tensor:
    return torch.cat([one.mask(logits_OLG[rows], noise) for rows, noise in one.chunks(logits_OLG)])


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
@each_pattern
def test_a_soft_group_sums_to_n(form: str, pattern: NMPattern) -> None:
    for scale, temperature in ((1.0, 4.0), (10.0, 0.3), (500.0, 0.05)):
        mask_OI = soft_mask(draw(form, pattern, scale=scale, temperature=temperature), logits_of(form, pattern))
        torch.testing.assert_close(
            mask_OI.unflatten(1, (-1, pattern.m)).sum(-1), torch.full((3, 5), 1.0 * pattern.n).double()
        )
        assert mask_OI.min() >= 0
        assert form == "reservoir" or mask_OI.max() <= 1 + 1e-12


@each_form
@each_pattern
def test_a_cold_sample_is_one_legal_pattern(form: str, pattern: NMPattern) -> None:
    mask_OI = soft_mask(draw(form, pattern, temperature=1e-6), logits_of(form, pattern))
    pattern.check_mask(mask_OI.round().bool())
    torch.testing.assert_close(mask_OI, mask_OI.round(), atol=1e-9, rtol=0)


@each_form
@each_pattern
def test_a_large_scale_leaves_noise_no_say(form: str, pattern: NMPattern) -> None:
    logits_OLG = logits_of(form, pattern)
    first, second = (soft_mask(draw(form, pattern, seed, scale=1e9), logits_OLG) for seed in (1, 2))
    pattern.check_mask(first.round().bool())
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("form", ["categorical", "additive"])
@each_pattern
def test_infinite_heat_is_the_mean_of_all_patterns(form: str, pattern: NMPattern) -> None:
    mask_OI = soft_mask(draw(form, pattern, temperature=1e9), logits_of(form, pattern))
    torch.testing.assert_close(mask_OI, torch.full_like(mask_OI, pattern.density), atol=1e-6, rtol=0)


@each_form
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_equal_logits_keep_every_column_equally(form: str, temperature: float) -> None:
    planes = 6 if form == "categorical" else 4
    mask_OI = soft_mask(draw(form, temperature=temperature), torch.zeros(100, planes, 250, dtype=torch.float64))
    mean_m = mask_OI.reshape(-1, 4).mean(0)
    torch.testing.assert_close(mean_m, torch.full_like(mean_m, 0.5), atol=0.015, rtol=0)


def chosen(one: MaskSample, logits_L: Tensor, samples: int = 20_000) -> list[int]:
    """How often each pattern is the sample's, over `samples` groups with the same logits."""
    logits_OLG = logits_L[None, :, None].expand(100, -1, samples // 100).contiguous()
    mask_NM = soft_mask(one, logits_OLG).reshape(-1, one.pattern.m).round().bool()
    found = (mask_NM[:, None] == one.pattern.candidates()).all(-1)
    assert found.any(-1).all()
    return found.sum(0).tolist()


@pytest.mark.parametrize("form", ["categorical", "additive"])
@each_pattern
def test_patterns_are_drawn_as_often_as_the_softmax_says(form: str, pattern: NMPattern) -> None:
    """Chi-square at 1e-4: a right sampler fails once in ten thousand seeds, and the seed is fixed."""
    logits_L = 0.01 * logits_of(form, pattern, 1, 1)[0, :, 0]
    pi_P = logits_L if form == "categorical" else pattern.candidates().double() @ logits_L
    expected_P = torch.softmax(100 * pi_P, 0) * 20_000
    observed_P = torch.tensor(chosen(draw(form, pattern, scale=100.0, temperature=1e-4), logits_L))
    statistic = float(((observed_P - expected_P).square() / expected_P).sum())
    assert statistic < chi2.ppf(1 - 1e-4, pattern.candidate_count - 1)


def test_the_reservoir_draws_without_replacement() -> None:
    """P(i, then j) = p_i p_j / (1 - p_i), in either order."""
    theta_m = torch.tensor([0.5, -0.3, 0.1, 0.0], dtype=torch.float64)
    p = torch.softmax(theta_m, 0).tolist()
    pairs = [[c for c in range(4) if row[c]] for row in TWO_FOUR.candidates().tolist()]
    expected = torch.tensor([20_000 * p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i, j in pairs])
    observed = torch.tensor(chosen(draw("reservoir", temperature=1e-5), theta_m))
    assert float(((observed - expected).square() / expected).sum()) < chi2.ppf(1 - 1e-4, 5)


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
