"""AdamW with bfloat16 moments against torch's own in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from maskgen.numerics import memory
from maskgen.numerics.adamw import CompactAdamW

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(steps: int, *shape: int) -> torch.Tensor:
    """Noisy gradients whose sizes span six orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 0, shape[-1])
    return (torch.randn(steps, *shape, generator=generator) + 0.3) * size


def run(kind: Callable[..., torch.optim.Optimizer], steps: int = 60) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(7, 50))
    optimizer = kind([parameter], **SETTINGS)
    for gradient in gradients(60, 7, 50)[:steps]:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer


def test_follows_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = run(torch.optim.AdamW)
    compact, optimizer = run(CompactAdamW)
    moved = (exact - 1).abs().mean()
    assert (compact - exact).abs().mean() < 0.005 * moved
    assert (compact - exact).abs().max() < 0.05 * moved
    assert {value.dtype for key, value in optimizer.state[compact].items() if key != "step"} == {torch.bfloat16}
    monkeypatch.setitem(memory.ELEMENTS, "cpu", 64)
    assert torch.equal(run(CompactAdamW)[0], compact)


def test_the_first_step_is_exact_but_for_rounding() -> None:
    exact, compact = run(torch.optim.AdamW, 1)[0], run(CompactAdamW, 1)[0]
    torch.testing.assert_close(compact, exact, rtol=1e-6, atol=0)


def test_moments_decay_when_gradients_stop() -> None:
    """In bfloat16 a moment that lost less than half a unit in the last place per step would stay for ever."""
    parameter, optimizer = run(CompactAdamW)
    before = optimizer.state[parameter]["exp_avg_sq"].clone()
    for _ in range(100):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(
        optimizer.state[parameter]["exp_avg_sq"].float(), before.float() * 0.95**100, rtol=0.25, atol=0
    )


def test_a_resumed_run_is_the_same_run() -> None:
    whole, _ = run(CompactAdamW, 20)
    parameter, optimizer = run(CompactAdamW, 10)
    resumed = nn.Parameter(parameter.detach().clone())
    again = CompactAdamW([resumed], **SETTINGS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients(60, 7, 50)[10:20]:
        resumed.grad = gradient.clone()
        again.step()
    assert torch.equal(resumed, whole)
    assert again.state[resumed]["exp_avg"].dtype == again.state[resumed]["exp_avg_sq"].dtype == torch.bfloat16


def test_parameters_without_gradient_stay() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = CompactAdamW([parameter], **SETTINGS)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3)) and not optimizer.state


def test_slow_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="can get stuck"):
        CompactAdamW([nn.Parameter(torch.ones(3))], 0.1, betas=(0.9, 0.999))
