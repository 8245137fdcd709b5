"""Gumbel noise: its distribution, and that a seed decides it."""

from __future__ import annotations

import math

import pytest
import torch

from maskgen.numerics.gumbel import gumbel


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_its_distribution_is_gumbel() -> None:
    """Kolmogorov-Smirnov at about 1e-4: D sqrt(N) < 2.2."""
    noise = gumbel((200, 6, 100), generator(0), torch.float64).flatten().sort().values
    grid = (torch.arange(noise.numel(), dtype=torch.float64) + 0.5) / noise.numel()
    assert float((torch.exp(-torch.exp(-noise)) - grid).abs().max()) * noise.numel() ** 0.5 < 2.2
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_neighbours_are_independent() -> None:
    """Four numbers come from one random word."""
    noise_N4 = gumbel((50_000, 4), generator(1), torch.float64)
    correlation = torch.corrcoef(noise_N4.T) - torch.eye(4)
    assert correlation.abs().max() < 0.02


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (7, 3, 1), (0, 5)])
def test_any_shape_and_the_same_again(shape: tuple[int, ...]) -> None:
    first, second = (gumbel(shape, generator(4), torch.float32) for _ in range(2))
    assert first.shape == shape and first.dtype == torch.float32 and torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert not shape[0] or not torch.equal(first, gumbel(shape, generator(5), torch.float32))


def test_one_generator_goes_on() -> None:
    one = generator(0)
    assert not torch.equal(gumbel((8,), one, torch.float32), gumbel((8,), one, torch.float32))
