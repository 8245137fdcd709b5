"""The loss: what the formula says, in every slicing and for both kinds of teacher.

Legend: N = tokens, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskgen.methods.learned import Mode
from maskgen.train import objective
from maskgen.train.objective import NO_TARGET, MixedLoss, Objective, in_mode, slice_losses
from tests import models
from tests.maskgen.training import Toy, corpus, session


def logits(seed: int, tokens: int = 7, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_NV, teacher_NV = (torch.randn(tokens, vocabulary, generator=generator) * 3 for _ in range(2))
    return student_NV, teacher_NV, torch.randint(vocabulary, (tokens,), generator=generator)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_the_divergence_is_the_sum_of_p_log_p_over_q(seed: int, temperature: float) -> None:
    student_NV, teacher_NV, target_N = logits(seed)
    ce, divergence, _ = slice_losses(student_NV, teacher_NV, target_N, 0.5, temperature)
    p_NV, q_NV = ((x.double() / temperature).softmax(-1) for x in (teacher_NV, student_NV))
    expected = (p_NV * (p_NV.log() - q_NV.log())).sum() * temperature**2
    assert float(divergence) == pytest.approx(float(expected), rel=1e-5)
    right_N = student_NV.double().softmax(-1).gather(1, target_N[:, None])
    assert ce.item() == pytest.approx(-float(right_N.log().sum()), rel=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_the_divergence_is_zero_for_equal_logits_and_positive_for_others(seed: int) -> None:
    student_NV, teacher_NV, target_N = logits(seed)
    assert float(slice_losses(student_NV, student_NV.clone(), target_N, 0.5, 2.0)[1]) == pytest.approx(0, abs=1e-5)
    shifted = student_NV + torch.arange(7.0)[:, None]
    assert float(slice_losses(student_NV, shifted, target_N, 0.5, 2.0)[1]) == pytest.approx(0, abs=1e-4)
    assert float(slice_losses(student_NV, teacher_NV, target_N, 0.5, 2.0)[1]) > 0


def test_nothing_is_taught_without_a_teacher() -> None:
    student_NV, _, target_N = logits(0)
    assert float(slice_losses(student_NV, None, target_N, 0.0, 1.0)[1]) == 0


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_gradient_is_that_of_the_mixed_sum(seed: int, weight: float, temperature: float) -> None:
    student_NV, teacher_NV, target_N = logits(seed)
    *_, gradient_NV = slice_losses(student_NV, teacher_NV, target_N, weight, temperature)
    exact_NV = student_NV.double().requires_grad_()
    q_NV, log_p_NV = (teacher_NV.double() / temperature).softmax(-1), (exact_NV / temperature).log_softmax(-1)
    ce = torch.nn.functional.cross_entropy(exact_NV, target_N, reduction="sum")
    ((1 - weight) * ce + weight * temperature**2 * (q_NV * (q_NV.log() - log_p_NV)).sum()).backward()
    assert exact_NV.grad is not None
    torch.testing.assert_close(gradient_NV, exact_NV.grad.float(), rtol=1e-4, atol=1e-5)


def test_tokens_without_a_target_do_not_count() -> None:
    student_NV, teacher_NV, target_N = logits(2)
    some_N = target_N.where(torch.arange(7) % 3 != 0, NO_TARGET)
    *some, gradient_NV = slice_losses(student_NV, teacher_NV, some_N, 0.5, 2.0)
    kept_N = torch.tensor([1, 2, 4, 5])
    *expected, _ = slice_losses(student_NV[kept_N], teacher_NV[kept_N], target_N[kept_N], 0.5, 2.0)
    torch.testing.assert_close(some, expected)
    assert gradient_NV.abs().sum(1).bool().tolist() == [False, True, True, False, True, True, False]


def test_what_does_not_count_may_be_anything() -> None:
    student_NV, teacher_NV, target_N = logits(4)
    target_N[2] = NO_TARGET
    expected = slice_losses(student_NV, teacher_NV, target_N, 0.5, 2.0)
    student_NV[2, 0], teacher_NV[2, 1] = -torch.inf, torch.nan
    torch.testing.assert_close(slice_losses(student_NV, teacher_NV, target_N, 0.5, 2.0), expected)


def test_the_gradient_lies_in_the_teacher_s_logits_and_serves_once() -> None:
    student_NV, teacher_NV, target_N = logits(3)
    student_BTV, teacher_BTV = student_NV[None].requires_grad_(), teacher_NV[None]
    total, *_ = MixedLoss.apply(student_BTV, teacher_BTV, target_N[None], 0.5, 2.0, slice_losses)
    (gradient_BTV,) = torch.autograd.grad(3 * total, student_BTV, retain_graph=True)
    assert gradient_BTV.data_ptr() == teacher_NV.data_ptr()
    *_, expected_NV = slice_losses(student_NV, logits(3)[1], target_N, 0.5, 2.0)
    torch.testing.assert_close(gradient_BTV[0], expected_NV * 3 / 7)
    with pytest.raises(AttributeError):
        total.backward()


def test_logits_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the student's nor the teacher's: they are the widest tensors there are."""
    trained, made, sliced = session(distill_weight=0.5), [], []
    forward, losses = trained.objective.logits, objective.slice_losses

    def storage(of: Tensor) -> int:
        return of.untyped_storage().data_ptr()

    def note_logits(*args: Any) -> Tensor:
        made.append(forward(*args))
        return made[-1]

    def note_slices(student_NV: Tensor, teacher_NV: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        sliced.append((storage(teacher_NV), storage(student_NV)))
        return losses(student_NV, teacher_NV, *rest)

    monkeypatch.setattr(Objective, "logits", lambda self, *args: note_logits(*args))
    monkeypatch.setattr(objective, "slice_losses", note_slices)
    trained.objective(trained.model, corpus().heldout[:3])
    assert sliced == [(storage(made[0]), storage(made[1]))]


def test_slices_are_computed_in_float32() -> None:
    student_NV, teacher_NV, target_N = logits(1)
    half = slice_losses(student_NV.bfloat16(), teacher_NV.bfloat16(), target_N, 0.5, 1.0)
    exact = slice_losses(student_NV.bfloat16().float(), teacher_NV.bfloat16().float(), target_N, 0.5, 1.0)
    assert all(part.dtype == torch.float32 for part in half) and all(map(torch.equal, half, exact))


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.67, 2.0), (1.0, 2.0)])
@pytest.mark.parametrize("slice_tokens", [1, 4, 7, 10_000])
def test_loss_and_gradient_do_not_depend_on_the_slices(
    weight: float, temperature: float, slice_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = session(Toy(noise=0.0))
    ids_BT = corpus().heldout[:3]
    monkeypatch.setattr(objective, "chunk_elements", lambda device: models.VOCABULARY * slice_tokens)
    loss = Objective(trained.layers, weight, temperature, torch.float32)(trained.model, ids_BT)
    loss.total.backward()
    found = [parameter.grad.clone() for parameter in trained.parameters]
    for parameter in trained.parameters:
        parameter.grad = None

    student = trained.model(input_ids=ids_BT).logits[:, :-1].flatten(0, 1)
    with torch.no_grad(), in_mode(trained.layers, Mode.DENSE):
        teacher = trained.model(input_ids=ids_BT).logits[:, :-1].flatten(0, 1)
    ce = torch.nn.functional.cross_entropy(student, ids_BT[:, 1:].flatten())
    p_NV, log_q_NV = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    divergence = (p_NV * (p_NV.log() - log_q_NV)).sum(-1).mean() * temperature**2
    total = (1 - weight) * ce + weight * divergence
    total.backward()

    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert loss.cross_entropy == pytest.approx(ce.item(), rel=1e-5)
    assert loss.divergence == pytest.approx(divergence.item() if weight else 0.0, rel=1e-4)
    for gradient, parameter in zip(found, trained.parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-7)


def test_the_own_teacher_is_the_dense_model_and_nothing_flows_into_it() -> None:
    trained, ids_BT = session(), corpus().heldout
    teacher = Objective(trained.layers, 0.5, 1.0, torch.float32)._teach(trained.model, ids_BT)
    with torch.no_grad():
        expected = models.build("llama")(input_ids=ids_BT).logits
    assert torch.equal(teacher, expected) and not teacher.requires_grad
    assert {layer.mode for layer in trained.layers.values()} == {Mode.TRAIN}


def test_a_frozen_copy_teaches_where_weights_are_trained() -> None:
    trained, text = session(Toy(learns_weights=True), distill_weight=0.5, scope="all"), corpus()
    ids_BT = text.heldout
    before = trained.objective._teach(trained.model, ids_BT)
    for _ in range(3):
        trained.run_step(text, 4)
    with torch.no_grad():
        expected = models.build("llama")(input_ids=ids_BT).logits
    assert torch.equal(trained.objective._teach(trained.model, ids_BT), before) and torch.equal(before, expected)
    with in_mode(trained.layers, Mode.DENSE), torch.no_grad():
        moved = trained.model(input_ids=ids_BT).logits[:, :-1]
    assert not torch.equal(moved, before)


def test_no_copy_is_made_when_nobody_is_taught() -> None:
    assert session(Toy(learns_weights=True)).objective.teacher is None
    assert session(Toy(), distill_weight=0.5).objective.teacher is None


def test_modes_end_with_their_block_even_when_it_fails() -> None:
    trained = session()
    with pytest.raises(RuntimeError, match="inside"), in_mode(trained.layers, Mode.HARD):
        assert {layer.mode for layer in trained.layers.values()} == {Mode.HARD}
        raise RuntimeError("inside")
    assert {layer.mode for layer in trained.layers.values()} == {Mode.TRAIN}


def test_bfloat16_is_for_products_only() -> None:
    trained, ids_BT = session(dtype="bfloat16"), corpus().heldout
    loss = Objective(trained.layers, 0.5, 1.0, torch.bfloat16)(trained.model, ids_BT)
    exact = Objective(trained.layers, 0.5, 1.0, torch.float32)(trained.model, ids_BT)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(exact.total.item(), rel=2e-2) and loss.total.item() != exact.total.item()
    loss.total.backward()
    assert {parameter.grad.dtype for parameter in trained.parameters} == {torch.float32}
