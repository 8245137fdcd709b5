"""MaskLLM's prior, schedules, reward and optimiser: what the options mean.

Legend: O = out features, I = in features, G = groups per row, P = patterns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import Layers, LearnedLinear, StepContext, TargetLayer
from maskgen.methods.learned.maskllm import MaskLLM, MaskLLMLinear
from maskgen.numerics.adamw import CompactAdamW
from tests.maskgen.methods.learned.test_maskllm import layer
from tests.maskgen.numerics.test_mask_sample import TWO_FOUR, each_form, each_pattern, generator


def prior_of(pattern: NMPattern, rows: int, groups: int) -> Tensor:
    return pattern.mask_from_scores(torch.rand(rows, groups * pattern.m, generator=generator(9)))


def attached(method: MaskLLM, prior_OI: Tensor | None, pattern: NMPattern, seed: int = 0) -> MaskLLMLinear:
    shape = (8, 8 * pattern.m) if prior_OI is None else prior_OI.shape
    linear = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    made = method.attach(TargetLayer(0, "up", linear, pattern, prior_OI), generator(seed))
    assert isinstance(made, MaskLLMLinear)
    return made


def test_the_prior_enters_as_similarity_less_its_mean() -> None:
    """For 2:4: +1 for the prior's own pattern, 0 for the four that share a column, -1 for its opposite."""
    prior_OI = prior_of(TWO_FOUR, 40, 20)
    logits_OPG = attached(MaskLLM(prior_strength=3.0, init_std=0.01), prior_OI, TWO_FOUR).logits.detach()
    similarity = torch.einsum("ogm,pm->opg", prior_OI.float().unflatten(1, (-1, 4)), TWO_FOUR.candidates().float()) - 1
    torch.testing.assert_close(logits_OPG, 0.03 * similarity)
    for value, count in ((1, 1), (0, 4), (-1, 1)):
        assert ((logits_OPG / 0.03 - value).abs() < 1e-4).sum(1).eq(count).all()


@each_pattern
def test_the_prior_s_mean_is_n_squared_over_m(pattern: NMPattern) -> None:
    prior_OI = prior_of(pattern, 6, 5)
    logits_OPG = attached(MaskLLM(prior_strength=1.0, init_std=1.0), prior_OI, pattern).logits.detach()
    torch.testing.assert_close(logits_OPG.mean(1), torch.zeros(6, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_OPG.amax(1), torch.full((6, 5), pattern.n - pattern.n**2 / pattern.m))


@each_form
@each_pattern
def test_without_noise_the_mask_starts_as_the_prior(form: str, pattern: NMPattern) -> None:
    prior_OI = prior_of(pattern, 16, 10)
    assert torch.equal(attached(MaskLLM(logits=form), prior_OI, pattern).mask(), prior_OI)


@pytest.mark.parametrize("strength, low, high", [(1.0, 0.46, 0.52), (3.0, 0.935, 0.955), (5.0, 0.9985, 1.0)])
def test_agreement_with_the_prior_under_noise(strength: float, low: float, high: float) -> None:
    prior_OI = prior_of(TWO_FOUR, 200, 250)
    mask_OI = attached(MaskLLM(prior_strength=strength, init_noise=True), prior_OI, TWO_FOUR).mask()
    agreement = float((mask_OI == prior_OI).unflatten(1, (-1, 4)).all(-1).float().mean())
    assert low < agreement < high


def test_the_first_sample_leans_to_the_prior_as_published() -> None:
    """kappa = 100, tau = 4, alpha = 3: soft entries of 0.62 where the prior keeps and 0.38 where it drops."""
    prior_OI = prior_of(TWO_FOUR, 100, 100)
    one = attached(MaskLLM(), prior_OI, TWO_FOUR)
    logits_OPG = one.logits.detach()
    mask_OI = torch.cat([one.sample().mask(logits_OPG[rows], noise) for rows, noise in one.sample().chunks(logits_OPG)])
    assert float(mask_OI[prior_OI].mean()) == pytest.approx(0.62, abs=0.01)
    assert float(mask_OI[~prior_OI].mean()) == pytest.approx(0.38, abs=0.01)


def test_no_prior() -> None:
    assert not MaskLLM(prior_strength=0.0).uses_prior and MaskLLM().uses_prior
    one = attached(MaskLLM(prior_strength=0.0, init_noise=True), None, TWO_FOUR)
    assert float(one.logits.detach().std()) == pytest.approx(0.01, rel=0.1)
    again = attached(MaskLLM(prior_strength=0.0, init_noise=True), None, TWO_FOUR)
    assert torch.equal(one.logits, again.logits)


def test_schedules() -> None:
    method = MaskLLM()
    start, middle, end = (StepContext(step, 11) for step in (0, 5, 10))
    assert [method.scale(context) for context in (start, middle, end)] == pytest.approx([100, 300, 500])
    assert [method.temperature(context) for context in (start, middle, end)] == pytest.approx([4, 0.2**0.5, 0.05])
    linear = MaskLLM(temperature_decay="linear", scale_growth="exponential", anneal=0.5)
    assert linear.temperature(StepContext(2, 9)) == pytest.approx(2.025)
    assert linear.scale(StepContext(2, 9)) == pytest.approx((100 * 500) ** 0.5)
    assert linear.temperature(StepContext(6, 9)) == 0.05 and linear.scale(StepContext(6, 9)) == 500
    assert method.temperature(StepContext(0, 1)) == 4


def reward(method: MaskLLM, one: MaskLLMLinear, context: StepContext) -> float:
    one(torch.zeros(1, 16))
    value = method.regulariser({"up": one}, context)
    return 0.0 if value is None else float(value.detach())


def test_the_reward_is_the_kept_energy_and_ends_at_zero() -> None:
    one = layer()
    one.context = StepContext(0, 5)
    noise = next(one.sample().chunks(one.logits))[1]
    kept = float((one.weight * one.sample().mask(one.logits.detach(), noise)).square().sum())
    dense = float(one.weight.square().sum())
    assert reward(MaskLLM(weight_reward=2.0), one, StepContext(0, 5)) == pytest.approx(-2 * kept / dense, rel=1e-5)
    assert reward(MaskLLM(weight_reward=2.0), one, StepContext(1, 5)) == pytest.approx(-1.5 * kept / dense, rel=1e-5)
    assert reward(MaskLLM(weight_reward=1e-5, reward_form="sum"), one, StepContext(0, 5)) == pytest.approx(-1e-5 * kept)
    assert reward(MaskLLM(), one, StepContext(4, 5)) == 0
    assert MaskLLM(weight_reward=0.0).regulariser({"up": one}, StepContext(0, 5)) is None


def test_the_normalised_reward_divides_by_the_whole_model() -> None:
    layers = {"a": layer(0), "b": layer(5)}
    for one in layers.values():
        one(torch.zeros(1, 16))
    kept = sum(float(one.energy.detach()) for one in layers.values() if one.energy is not None)
    dense = sum(float(one.weight.square().sum()) for one in layers.values())
    value = MaskLLM().regulariser(layers, StepContext(0, 5))
    assert value is not None and float(value.detach()) == pytest.approx(-kept / dense, rel=1e-5)


def test_the_reward_pulls_towards_the_largest_weights() -> None:
    """Nothing but the reward: descending its gradient raises the probability of the magnitude mask in every group."""
    one = layer(prior_strength=0.0)
    one(torch.zeros(1, 16))
    MaskLLM().regulariser({"up": one}, StepContext(0, 5)).backward()
    stepped_OPG = -one.logits.grad
    best_OG = stepped_OPG.argmax(1)
    largest_OI = TWO_FOUR.mask_from_scores(one.weight.abs())
    agreement = (TWO_FOUR.candidates()[best_OG].flatten(1) == largest_OI).unflatten(1, (-1, 4)).all(-1).float().mean()
    assert agreement > 0.75
    assert stepped_OPG.sum(1).abs().max() < 1e-6


def learn(steps: int = 60, **options: Any) -> tuple[MaskLLMLinear, Tensor]:
    """Recover a planted mask from inputs and outputs alone; the weights' sizes say nothing."""
    method = MaskLLM(**{"prior_strength": 0.0, "weight_reward": 0.0, **options})
    one = attached(method, None, TWO_FOUR)
    with torch.no_grad():
        one.weight.copy_(torch.randn(8, 32, generator=generator(3)).sign())
    x = torch.randn(256, 32, generator=generator(4))
    planted_OI = prior_of(TWO_FOUR, 8, 8)
    target = x @ (one.weight * planted_OI).T
    layers: Layers = {"up": one}
    optimizer = method.optimizer(layers, [], 0.02)
    for step in range(steps):
        one.context = StepContext(step, steps, step)
        optimizer.zero_grad()
        (one(x) - target).square().mean().backward()
        optimizer.step()
    return one, planted_OI


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moments": "bfloat16"},
        {"logits": "additive"},
        {"logits": "reservoir", "scale_start": 50.0},
        {"temperature_decay": "linear"},
    ],
    ids=str,
)
def test_a_planted_mask_is_found(options: dict[str, Any]) -> None:
    one, planted_OI = learn(**options)
    assert (one.mask() == planted_OI).float().mean() > 0.98


def test_the_same_run_twice_is_the_same_run() -> None:
    assert torch.equal(learn(steps=5)[0].logits, learn(steps=5)[0].logits)


@pytest.mark.parametrize("moments, kind", [("bfloat16", CompactAdamW), ("float32", torch.optim.AdamW)])
def test_the_optimiser_has_the_published_settings_and_no_weights(moments: str, kind: type) -> None:
    one = layer()
    optimizer = MaskLLM(adam_eps=1e-5, weight_decay=0.2, moments=moments).optimizer({"up": one}, [], 0.5)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(one.logits)]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.9, 0.95), 1e-5, 0.2)
    with pytest.raises(RecipeError, match="frozen weights"):
        MaskLLM().optimizer({"up": one}, [nn.Parameter(torch.ones(2))], 0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"logits": "soft"}, r"method\.logits 'soft': expected one of \['additive', 'categorical', 'reservoir'\]"),
        ({"temperature_decay": "cosine"}, r"method\.temperature_decay 'cosine'"),
        ({"moments": "float16"}, r"method\.moments 'float16': expected one of \['bfloat16', 'float32'\]"),
        ({"scale_growth": ""}, r"method\.scale_growth"),
        ({"reward_form": "mean"}, r"method\.reward_form"),
        ({"temperature_end": 0.0}, r"method\.temperature_end 0\.0: expected a positive"),
        ({"scale_start": float("inf")}, r"method\.scale_start inf"),
        ({"init_std": -1.0}, r"method\.init_std -1\.0"),
        ({"anneal": float("nan")}, r"method\.anneal nan"),
        ({"weight_reward": -1.0}, r"method\.weight_reward -1\.0: expected"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MaskLLM(**options)


def test_patterns_with_too_many_candidates() -> None:
    with pytest.raises(RecipeError, match=r"method\.logits 'categorical': pattern 8:16 has 12870 candidates"):
        MaskLLM().check_pattern(NMPattern(8, 16))
    MaskLLM().check_pattern(NMPattern(4, 8))


def test_every_pattern_trains() -> None:
    for pattern in (NMPattern(1, 4), NMPattern(4, 8), NMPattern(1, 2)):
        one: LearnedLinear = attached(MaskLLM(), None, pattern)
        one(torch.randn(2, one.in_features, generator=generator())).sum().backward()
        pattern.check_mask(one.mask())
