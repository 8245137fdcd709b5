"""Masks drawn by Gumbel-softmax, each form against its definition and its limits.

Legend: O = out features, I = in features, G = groups per row, m = columns per group, P = patterns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from maskgen.core.pattern import NMPattern
from maskgen.numerics.mask_sample import FORMS, MaskSample

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
def test_a_straight_through_sample_is_a_legal_mask_with_the_gradient_of_the_soft_one(
    form: str, pattern: NMPattern
) -> None:
    logits_OLG = logits_of(form, pattern)
    soft, hard = draw(form, pattern, temperature=2.0), replace(draw(form, pattern, temperature=2.0), hard=True)
    pull_OI = torch.randn(3, 5 * pattern.m, generator=generator(9), dtype=torch.float64)
    gradients = []
    for one in (soft, hard):
        leaf = logits_OLG.clone().requires_grad_()
        mask_OI = soft_mask(one, leaf)
        (gradient,) = torch.autograd.grad((mask_OI * pull_OI).sum(), leaf)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
    pattern.check_mask(mask_OI.detach().round().bool())
    torch.testing.assert_close(mask_OI, mask_OI.round(), atol=1e-9, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(soft_mask(hard, logits_OLG), mask_OI.detach(), atol=1e-9, rtol=0)
        pattern.check_mask(soft_mask(replace(hard, scale=0.0), torch.zeros_like(logits_OLG)).round().bool())
    if form == "categorical":
        cold_OI = soft_mask(draw(form, pattern, temperature=1e-6), logits_OLG)
        torch.testing.assert_close(mask_OI.detach(), cold_OI, atol=1e-9, rtol=0)


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
