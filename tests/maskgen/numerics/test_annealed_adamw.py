"""AST's optimiser: its equations in plain loops, the sign of the decay, resuming, shards.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from maskgen.methods.learned import StepContext, TargetLayer
from maskgen.methods.learned.adaptive_sparse import AdaptiveLinear, AdaptiveSparse
from maskgen.numerics.annealed_adamw import AnnealedAdamW
from tests.maskgen.methods.learned.adaptive import IN, OUT, PATTERN, attach, random, step


def oracle(
    w: float, gradients: list[float], kept: bool, decays: list[float], lr: float, wd: float, raw: bool
) -> list[float]:
    """One weight through the update of the module's docstring, in double precision."""
    mu = v = 0.0
    path = []
    for t, (g, decay) in enumerate(zip(gradients, decays, strict=True), 1):
        mu = 0.9 * mu + 0.1 * g
        decayed = 0.0 if kept else decay * w
        u = mu / (1 - 0.9**t) + decayed
        v = 0.95 * v + 0.05 * (g**2 + decayed**2 if raw else u**2)
        w = (1 - lr * wd) * w - lr * u / (math.sqrt(v) / math.sqrt(1 - 0.95**t) + 1e-8)
        path.append(w)
    return path


@pytest.mark.parametrize("second_moment", ["decayed", "raw"])
def test_the_update_is_the_stated_one(second_moment: str) -> None:
    method = AdaptiveSparse(masked_decay=0.05, ramp=0.5, weight_decay=0.1, second_moment=second_moment)
    layer = attach(method)
    optimizer = method.optimizer({"a": layer}, [], 1e-3)
    start_OI = layer.weight.detach().clone()
    gradients = [random(OUT, IN, seed=10 + at) * 0.01 for at in range(6)]
    path = []
    for at, gradient_OI in enumerate(gradients):
        step(layer, optimizer, gradient_OI, at, steps=6)
        path.append(layer.weight.detach().clone())
    decays = [0.05 * min(1.0, at / 3) for at in range(6)]
    for o, i in [(0, 0), (0, 1), (1, 2), (3, 7), (7, 31), (5, 20), (6, 9), (2, 14)]:
        expected = oracle(
            float(start_OI[o, i]), [float(g[o, i]) for g in gradients], bool(layer.kept_OI[o, i]), decays, 1e-3, 0.1,
            second_moment == "raw",
        )  # fmt: skip
        assert [float(weight[o, i]) for weight in path] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_without_gradient_pruned_weights_fall_and_kept_ones_only_decay() -> None:
    method = AdaptiveSparse(masked_decay=1e-3, ramp=0.0, weight_decay=0.1)
    layer = attach(method)
    optimizer = method.optimizer({"a": layer}, [], 1e-3)
    kept_OI, start_OI = layer.kept_OI.clone(), layer.weight.detach().clone()
    last_OI = start_OI
    for at in range(1, 101):
        step(layer, optimizer, torch.zeros(OUT, IN), at, steps=1000)
        weight_OI = layer.weight.detach().clone()
        far_OI = ~kept_OI & (last_OI.abs() > 0.01)
        assert (weight_OI.abs() < last_OI.abs())[far_OI].all(), "the decay has the wrong sign"
        assert (weight_OI.abs() <= last_OI.abs().clamp(min=0.003))[~kept_OI].all()
        last_OI = weight_OI
    torch.testing.assert_close(last_OI[kept_OI], start_OI[kept_OI] * (1 - 1e-4) ** 100)
    assert float(last_OI[~kept_OI].abs().mean()) < 0.2 * float(start_OI[~kept_OI].abs().mean())


def test_a_pruned_weight_without_gradient_is_not_thrown_across_zero() -> None:
    method = AdaptiveSparse(masked_decay=1e-3, ramp=0.0, second_moment="raw")
    layer = attach(method)
    optimizer = method.optimizer({"a": layer}, [], 1e-3)
    largest = float(layer.weight.detach().abs().max())
    for at in range(1, 30):
        step(layer, optimizer, random(OUT, IN, seed=at) * 1e-9, at, steps=30)
        assert float(layer.weight.detach().abs().max()) <= largest + 0.03


def test_lambda_rises_linearly_and_stays() -> None:
    layer = attach(AdaptiveSparse(masked_decay=8e-4, ramp=0.25))
    decays = []
    for at in (0, 10, 20, 25, 26, 99):
        layer.context = StepContext(at, 100)
        decays.append(layer.pruned()[1])
    assert decays == pytest.approx([0.0, 3.2e-4, 6.4e-4, 8e-4, 8e-4, 8e-4])


def test_other_parameters_take_plain_adamw_steps() -> None:
    matrix, norm = nn.Parameter(random(6, 5, seed=6)), nn.Parameter(random(5, seed=7))
    twins = nn.Parameter(matrix.detach().clone()), nn.Parameter(norm.detach().clone())
    optimizer = AdaptiveSparse(weight_decay=0.1).optimizer({}, [matrix, norm], 1e-2)
    peer = torch.optim.AdamW(
        [{"params": [twins[0]], "weight_decay": 0.1}, {"params": [twins[1]], "weight_decay": 0.0}], 1e-2,
        betas=(0.9, 0.95),
    )  # fmt: skip
    for at in range(5):
        for ours, theirs in zip((matrix, norm), twins, strict=True):
            ours.grad = random(*ours.shape, seed=20 + at)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
    torch.testing.assert_close(matrix, twins[0])
    torch.testing.assert_close(norm, twins[1])


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    method = AdaptiveSparse(slorb_segment=16, refresh_every=4)
    gradients = [random(OUT, IN, seed=30 + at) for at in range(12)]

    def run(layer: AdaptiveLinear, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for at in steps:
            method.before_step({"a": layer}, StepContext(at, 12))
            assert layer.out is not None
            layer.out.grad = gradients[at][:, : IN // 16].clone()
            step(layer, optimizer, gradients[at], at, 12)

    straight = attach(method)
    run(straight, method.optimizer({"a": straight}, [], 0.05), range(12))
    first = attach(method)
    optimizer = method.optimizer({"a": first}, [], 0.05)
    run(first, optimizer, range(6))
    saved: dict[str, Any] = copy.deepcopy({"layer": first.state_dict(), "optimizer": optimizer.state_dict()})
    assert saved["layer"]["kept_OI"].dtype == torch.bool
    second = attach(method, seed=99)
    optimizer = method.optimizer({"a": second}, [], 0.05)
    second.load_state_dict(saved["layer"])
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, range(6, 12))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert not torch.equal(first.kept_OI, straight.kept_OI)


@pytest.fixture
def second_of_two() -> Iterator[None]:
    """This process as the second of two that never speak to each other."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_two")
def test_a_shard_takes_the_step_of_its_rows() -> None:
    rows = slice(5, 9)
    mesh = init_device_mesh("cpu", (2,))
    method = AdaptiveSparse(masked_decay=1e-2, ramp=0.0)
    whole_OI = random(9, IN, seed=8)

    def build(weight_OI: Tensor) -> tuple[AdaptiveLinear, AnnealedAdamW]:
        linear = nn.Linear(IN, 9, bias=False)
        linear.weight = nn.Parameter(whole_OI.clone())
        layer = AdaptiveLinear(TargetLayer(0, "a", linear, PATTERN), method, torch.Generator())
        layer.weight = nn.Parameter(weight_OI)
        return layer, AnnealedAdamW([layer.weight], {layer.weight: layer.pruned}, 1e-2, weight_decay=0.1)

    def shard(full_OI: Tensor) -> DTensor:
        return DTensor.from_local(full_OI[rows].clone(), mesh, [Shard(0)], shape=full_OI.shape, stride=(IN, 1))

    layer, optimizer = build(whole_OI.clone())
    part, part_optimizer = build(shard(whole_OI))
    for at in range(1, 4):
        gradient_OI = random(9, IN, seed=at)
        step(layer, optimizer, gradient_OI, at, 4)
        part.context = layer.context
        part.weight.grad = shard(gradient_OI)
        part_optimizer.step()
    assert isinstance(part.weight, DTensor)
    assert torch.equal(part.weight.to_local(), layer.weight[rows])
    assert not torch.equal(layer.weight, whole_OI)
