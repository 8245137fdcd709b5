"""ProxSparse: the algebra of its proximal map against brute force, the penalties, and what a run does to a layer.

Legend: O = out features, I = in features, G = groups, S = starting points.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods.learned import Mode, StepContext, TargetLayer, proxsparse
from maskgen.methods.learned.proxsparse import ProxSparse, ProxSparseLinear, prox, reg0, reg24
from tests.maskgen.training import corpus, session

PATTERN = NMPattern(2, 4)

entry = st.floats(-4, 4, width=32).map(lambda value: 0.0 if abs(value) < 1e-3 else value)
group = st.lists(entry, min_size=4, max_size=4).map(lambda values: torch.tensor([values]))
penalty = st.floats(0.0, 4.0)


def objective(w_G4: Tensor, v_G4: Tensor, lambda1: float) -> Tensor:
    """0.5 ||w - v||^2 + lambda1 R(w) in double precision, `[..., 4] -> [...]`, from the definition."""
    w_G4, v_G4 = w_G4.double(), v_G4.double()
    a, b, c, d = w_G4.abs().unbind(-1)
    return 0.5 * (w_G4 - v_G4).square().sum(-1) + lambda1 * (a * b * c + b * c * d + c * d * a + d * a * b)


def two_largest(v_G4: Tensor) -> Tensor:
    return v_G4 * PATTERN.mask_from_scores(v_G4.abs())


def multistart(v_G4: Tensor, lambda1: float, starts: int = 60) -> Tensor:
    """Least objective `[G]` that projected coordinate descent finds from many random points, in double precision."""
    generator = torch.Generator().manual_seed(0)
    z_G4 = v_G4.double().abs()
    w_SG4 = z_G4 * torch.rand(starts, *z_G4.shape, generator=generator, dtype=torch.float64)
    for _ in range(400):
        for i in torch.randperm(4, generator=generator).tolist():
            a, b, c = (w_SG4[..., j] for j in range(4) if j != i)
            w_SG4[..., i] = (z_G4[:, i] - lambda1 * (a * b + b * c + c * a)).clamp(min=0)
    return objective(w_SG4, z_G4, lambda1).amin(0)


@pytest.mark.parametrize("lambda1", [0.01, 0.1, 0.16, 0.17, 0.3, 0.6, 0.9, 1.2, 3.0])
def test_the_prox_is_the_global_minimum(lambda1: float) -> None:
    v_G4 = torch.rand(300, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    v_G4 /= v_G4.abs().amax(1, keepdim=True)  # so that lambda1 is lambda1 z1
    found_G = objective(prox(v_G4, lambda1), v_G4, lambda1)
    assert float((found_G - multistart(v_G4, lambda1)).max()) < 1e-6


@given(group, penalty)
def test_no_candidate_is_better(v_G4: Tensor, lambda1: float) -> None:
    found = float(objective(prox(v_G4, lambda1), v_G4, lambda1))
    slack = 1e-6 * (1 + float(v_G4.square().sum()) * (1 + lambda1 * float(v_G4.abs().max())))
    assert found <= float(objective(two_largest(v_G4), v_G4, lambda1)) + slack
    assert found <= float(objective(v_G4, v_G4, lambda1)) + slack
    assert found <= float(objective(torch.zeros(1, 4), v_G4, lambda1)) + slack


@given(group, penalty)
def test_the_prox_shrinks_and_keeps_signs_and_order(v_G4: Tensor, lambda1: float) -> None:
    w_G4 = prox(v_G4, lambda1)
    assert (w_G4.abs() <= v_G4.abs()).all()
    assert (w_G4 * v_G4 >= 0).all()
    w, v = w_G4[0].abs().tolist(), v_G4[0].abs().tolist()
    assert all(w[i] >= w[j] - 1e-5 for i in range(4) for j in range(4) if v[i] > v[j])


@given(group, penalty, st.permutations(range(4)), st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4))
def test_permuting_or_negating_goes_through(v_G4: Tensor, lambda1: float, order: list[int], signs: list[float]) -> None:
    assume(len(set(v_G4.abs()[0].tolist())) == 4)  # which of two equal weights survives is a matter of their place
    sign_4 = torch.tensor(signs)
    moved_G4 = prox(v_G4[:, order] * sign_4, lambda1)
    torch.testing.assert_close(moved_G4, prox(v_G4, lambda1)[:, order] * sign_4, rtol=0, atol=4e-6)


@given(group, penalty, st.sampled_from([0.0078125, 0.25, 2.0, 64.0]))
def test_only_lambda_times_size_matters(v_G4: Tensor, lambda1: float, scale: float) -> None:
    torch.testing.assert_close(prox(v_G4 * scale, lambda1 / scale), prox(v_G4, lambda1) * scale, rtol=1e-6, atol=0)


@given(group)
def test_lambda_0_is_the_identity(v_G4: Tensor) -> None:
    assert torch.equal(prox(v_G4, 0.0), v_G4)


@given(group, st.floats(1.5, 50.0))
def test_a_strong_penalty_keeps_exactly_the_two_largest(v_G4: Tensor, strength: float) -> None:
    magnitudes = sorted(v_G4.abs()[0].tolist(), reverse=True)
    assume(magnitudes[1] > 0)
    w_G4 = prox(v_G4, strength / magnitudes[0])
    assert int((w_G4 != 0).sum()) == 2
    assert sorted(w_G4.abs()[0].tolist(), reverse=True)[:2] == magnitudes[:2]


@given(group, penalty)
def test_what_is_sparse_already_stays(v_G4: Tensor, lambda1: float) -> None:
    sparse_G4 = two_largest(v_G4)
    assert torch.equal(prox(sparse_G4, lambda1), sparse_G4)


@given(group)
@settings(max_examples=300)
def test_reg24_is_0_exactly_for_two_or_fewer(v_G4: Tensor) -> None:
    assert (float(reg24(v_G4)) == 0) == (int((v_G4 != 0).sum()) <= 2)
    assert float(reg24(v_G4)) == pytest.approx(float(objective(v_G4, v_G4, 1.0)), rel=1e-5)


def test_shapes_and_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    whole_OI = prox(weight_OI, 0.4)
    assert torch.equal(prox(weight_OI.view(-1, 4), 0.4).view(24, 64), whole_OI)
    monkeypatch.setattr(proxsparse, "CHUNK_GROUPS", 50)
    torch.testing.assert_close(prox(weight_OI, 0.4), whole_OI, rtol=0, atol=1e-7)


def test_a_gpu_gets_chunks_that_fill_it() -> None:
    assert proxsparse._chunk_groups(torch.device("cpu")) == proxsparse.CHUNK_GROUPS
    assert proxsparse._chunk_groups(torch.device("cuda")) >= 32 * proxsparse.CHUNK_GROUPS


def test_real_strengths_converge_in_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * 0.05
    converged_OI = prox(weight_OI, 0.2)
    monkeypatch.setattr(proxsparse, "ROUNDS", 1)
    torch.testing.assert_close(prox(weight_OI, 0.2), converged_OI, rtol=0, atol=2e-7)
    assert not torch.allclose(prox(weight_OI, 8.0), converged_OI)


def test_reg0_is_0_at_home_and_at_0_and_positive_elsewhere() -> None:
    original_OI = torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    original_OI[0, :4] = 0
    assert float(reg0(original_OI, original_OI, 0.5)) == 0
    assert float(reg0(torch.zeros(8, 16), original_OI, 0.5)) == 0
    kept_OI = torch.rand(8, 16, generator=torch.Generator().manual_seed(5)) < 0.5
    assert float(reg0(original_OI * kept_OI, original_OI, 0.5)) == 0
    assert float(reg0(original_OI * 0.5, original_OI, 0.5)) > 0
    w, w0 = 0.3, -0.8
    assert float(reg0(torch.tensor([[w]]), torch.tensor([[w0]]), 0.5)) == pytest.approx(
        (w / (w0 - 0.5) * (w - w0)) ** 2
    )


def make_layer(method: ProxSparse, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    linear = nn.Linear(32, 16)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        linear.weight.normal_(0, 0.1, generator=generator)
    linear.to(dtype).requires_grad_(False)
    layer = method.attach(TargetLayer(0, "a", linear, PATTERN), generator)
    assert isinstance(layer, ProxSparseLinear)
    layers = {"a": layer}
    return layers, method.optimizer(layers, [], 1e-3)


def test_lambda1_follows_the_rule_or_the_option() -> None:
    layers, _ = make_layer(ProxSparse(strength=2.0))
    sigma = float(layers["a"].weight.square().mean().sqrt())
    assert layers["a"].lambda1 == pytest.approx(2.0 * 1e-3 / sigma**2, rel=1e-6)
    layers, _ = make_layer(ProxSparse(lambda1=0.7))
    assert layers["a"].lambda1 == 0.7


@pytest.mark.parametrize(("steps", "warns"), [(10, True), (100_000, False)])
def test_a_run_that_is_too_short_says_so_once(steps: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    method = ProxSparse()
    layers, _ = make_layer(method)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            method.before_step(layers, StepContext(step, steps))
    assert len(caplog.records) == warns
    assert not warns or "raise method.strength" in caplog.text


def test_the_shrink_does_not_follow_the_learning_rate() -> None:
    method = ProxSparse(lambda1=0.9)
    layers, _ = make_layer(method)
    expected_OI = prox(layers["a"].learned.detach(), 0.9)
    with torch.no_grad():
        method.after_step(layers, StepContext(0, 10), lr=0.0)
    assert torch.equal(layers["a"].learned, expected_OI)
    assert not torch.equal(expected_OI, layers["a"].weight)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_prox_runs_once_per_optimiser_step(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counted(values: Tensor, lambda1: float) -> Tensor:
        calls.append(lambda1)
        return prox(values, lambda1)

    monkeypatch.setattr(proxsparse, "prox", counted)
    running = session(ProxSparse(lambda1=0.2), batch=4)
    for _ in range(2):
        running.run_step(corpus(), micro_batch)
    assert calls == [0.2] * (2 * len(running.layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_learned_and_the_weights_stay(dtype: torch.dtype) -> None:
    method = ProxSparse(strength=4.0)
    layers, optimizer = make_layer(method, dtype)
    layer = layers["a"]
    original_OI = layer.weight.clone()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(7)).to(dtype)
    target = torch.randn(64, 16, generator=torch.Generator().manual_seed(8)).to(dtype)
    before_OI = layer.mask()
    for step in range(40):
        ((layer(x) - target).float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(layers, StepContext(step, 40), lr=1e-3)
    PATTERN.check_mask(layer.mask())
    assert not torch.equal(layer.mask(), before_OI)
    assert layer.learned.dtype == torch.float32 and not torch.equal(layer.learned, original_OI.float())
    assert torch.equal(layer.weight, original_OI) and not layer.weight.requires_grad
    assert layer.solution().weight is None and torch.equal(layer.solution().mask, layer.mask())
    layer.mode = Mode.HARD
    assert torch.equal(layer(x), nn.functional.linear(x, original_OI * layer.mask(), layer.bias))
    layer.mode = Mode.DENSE
    assert torch.equal(layer(x), nn.functional.linear(x, original_OI, layer.bias))


def test_the_frozen_weight_penalty_reaches_the_gradient() -> None:
    assert ProxSparse().regulariser({}, StepContext(0, 10)) is None
    method = ProxSparse(lambda2=0.25)
    layers, _ = make_layer(method)
    layer = layers["a"]
    with torch.no_grad():
        layer.learned.mul_(0.7)
    total = method.regulariser(layers, StepContext(0, 10))
    assert total is not None
    total.backward()
    learned_OI = layer.learned.detach().clone().requires_grad_()
    (0.25 * reg0(learned_OI, layer.weight, 0.5)).backward()
    assert torch.equal(layer.learned.grad, learned_OI.grad) and float(learned_OI.grad.abs().max()) > 0


def test_what_cannot_be_done_is_refused() -> None:
    for pattern in (NMPattern(1, 4), NMPattern(4, 8)):
        with pytest.raises(RecipeError, match="2:4 only"):
            ProxSparse().check_pattern(pattern)
    ProxSparse().check_pattern(PATTERN)
    for options in ({"strength": -1.0}, {"lambda2": float("inf")}, {"eps": 0.0}, {"strength": 0.0}):
        with pytest.raises(RecipeError, match=r"method\."):
            ProxSparse(**options)
    layers, _ = make_layer(ProxSparse())
    with pytest.raises(RecipeError, match="set it to 'targets'"):
        ProxSparse().optimizer(layers, [nn.Parameter(torch.ones(3))], 1e-3)
