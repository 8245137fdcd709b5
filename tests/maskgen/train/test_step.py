"""One step of training: the same whatever fits into a forward pass, and refused before it breaks anything."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import create
from maskgen.methods.learned import FixedLinear, LearnedMethod, Mode, learned_parameters
from maskgen.recipes.sections import Training
from maskgen.train.objective import autocast
from maskgen.train.step import Session, heldout_nll, schedule
from tests import models
from tests.maskgen.training import PATTERN, Toy, assert_same, corpus, session, state


def gradients(of: Session, micro_batch: int) -> list[Tensor]:
    """What the optimiser is given in the next step."""
    seen: list[Tensor] = []
    of.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.extend(parameter.grad.clone() for parameter in of.parameters)
    )
    of.run_step(corpus(), micro_batch)
    return seen


@pytest.mark.parametrize("noise_samples", [1, 2, 3])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_gradient_does_not_depend_on_the_micro_batch(noise_samples: int, weight: float) -> None:
    options = {"batch": 6, "noise_samples": noise_samples, "distill_weight": weight, "clip": 0.0}
    whole = gradients(session(**options), 6)
    for micro_batch in (1, 2, 4):
        parts = gradients(session(**options), micro_batch)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
    assert max(float(gradient.abs().max()) for gradient in whole) > 1e-6


def test_noise_samples_are_different_and_follow_from_seed_and_step() -> None:
    one, two, again = (gradients(session(batch=6, noise_samples=n), 6) for n in (1, 2, 1))
    other_seed = gradients(session(batch=6, seed=1), 6)
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, two)) and not any(map(torch.equal, one, other_seed))


def test_two_runs_have_the_same_bits_and_learn() -> None:
    first, second, text = session(steps=12), session(steps=12), corpus()
    losses = [first.run_step(text, 2).loss for _ in range(12)]
    assert losses == [second.run_step(text, 2).loss for _ in range(12)]
    assert_same(state(first), state(second))
    assert losses[-1] < losses[0]


def test_only_what_is_to_be_trained_moves() -> None:
    trained, before = session(), state(session())
    trained.run_step(corpus(), 4)
    moved = {name for name, tensor in state(trained).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{name}.{part}" for name in trained.layers for part in ("score", "kept_OI")}
    trained = session(Toy(learns_weights=True), scope="all")
    trained.run_step(corpus(), 4)
    after = state(trained)
    unmoved = {name for name in before if torch.equal(after[name], before[name])}
    assert not unmoved
    trained = session(Toy(learns_weights=True), scope="blocks")
    trained.run_step(corpus(), 4)
    after = state(trained)
    unmoved = {name for name in before if torch.equal(after[name], before[name])}
    assert unmoved and not any(".layers." in name for name in unmoved), "norms of blocks move, the last one does not"
    rates = [group["lr"] for group in trained.optimizer.param_groups]
    assert rates == [1e-2, 1e-3]


def test_the_learning_rate_of_every_group_follows_the_schedule() -> None:
    trained = session(Toy(learns_weights=True), scope="all", steps=4, warmup=0.5, final_lr=0.5)
    seen = []
    for _ in range(4):
        log = trained.run_step(corpus(), 4)
        seen.append([log.lr, *(group["lr"] for group in trained.optimizer.param_groups)])
    factors = [schedule(trained.spec, step) for step in range(4)]
    assert seen == [[1e-2 * factor, 1e-2 * factor, 1e-3 * factor] for factor in factors]


def test_schedule() -> None:
    spec = Training(steps=11, warmup=0.0, final_lr=0.2)
    assert [schedule(spec, step) for step in (0, 5, 10)] == pytest.approx([1, 0.6, 0.2])
    linear = Training(steps=12, warmup=0.25, decay="linear", final_lr=0.0)
    assert [schedule(linear, step) for step in (0, 1, 2, 3, 7, 11)] == pytest.approx([0.25, 0.5, 0.75, 1, 0.5, 0])
    assert schedule(Training(steps=1), 0) == 1


def test_a_loss_that_is_not_a_number_stops_before_anything_moves() -> None:
    broken = session()
    broken.run_step(corpus(), 4)
    with torch.no_grad():
        next(iter(broken.layers.values())).score[0, 0] = float("nan")
    before = state(broken)
    with pytest.raises(NumericalError, match=r"step 2: the loss is nan; lower train\.lr"):
        broken.run_step(corpus(), 4)
    after = {name: tensor for name, tensor in state(broken).items() if not tensor.isnan().any()}
    assert_same(after, {name: before[name] for name in after})
    assert broken.step == 1


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_anything_moves(clip: float) -> None:
    broken, before = session(clip=clip), state(session())
    layer = next(iter(broken.layers.values()))
    layer.score.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NumericalError, match=r"step 1: the norm of the gradient is (nan|inf)"):
        broken.run_step(corpus(), 4)
    moved = {name for name, tensor in state(broken).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{name}.kept_OI" for name in broken.layers}
    assert all(parameter.grad is None for parameter in broken.parameters)


def test_clipping() -> None:
    free, tight = session(clip=0.0), session(clip=1e-3)
    unclipped, clipped = gradients(free, 4), gradients(tight, 4)
    norm = sum(float(gradient.square().sum()) for gradient in unclipped) ** 0.5
    assert sum(float(gradient.square().sum()) for gradient in clipped) ** 0.5 == pytest.approx(1e-3, rel=1e-3)
    assert session(clip=1e-3).run_step(corpus(), 4).gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("llama", "targets"), ("qwen2", "targets"), ("opt", "targets"), ("gpt_neox", "targets"), ("llama_tied", "all")],
)
def test_checkpointed_activations_change_no_bit(kind: str, scope: str) -> None:
    plain, saving = (
        session(
            Toy(learns_weights=scope == "all"), kind, checkpointed=checkpointed, distill_weight=0.5, noise_samples=2,
            scope=scope,
        )
        for checkpointed in (False, True)
    )  # fmt: skip
    assert list(saving.model.state_dict()) == list(plain.model.state_dict())
    calls: list[str] = []
    first = next(iter(saving.layers.values()))
    first.register_forward_hook(lambda module, args, y: calls.append(first.mode.value))
    for _ in range(2):
        one, other = plain.run_step(corpus(), 2), saving.run_step(corpus(), 2)
        assert (one.loss, one.gradient_norm) == (other.loss, other.gradient_norm)
    assert_same(state(plain), state(saving))
    seen = ["dense", "train", "train"] if scope == "targets" else ["train", "train"]  # else a copy teaches
    assert calls == seen * 2 * 2, "two forward passes for each backward, or nothing is saved"


def test_held_out_loss_is_that_of_the_exported_model() -> None:
    trained, text = session(), corpus()
    for _ in range(3):
        trained.run_step(text, 4)
    masked = copy.deepcopy(session().model)
    for name, layer in trained.layers.items():
        masked.get_submodule(name).mode = Mode.DENSE
        masked.get_submodule(name).weight.mul_(layer.solution().mask)
    with torch.no_grad():
        expected = float(masked(input_ids=text.heldout, labels=text.heldout).loss)
    assert heldout_nll(trained, text.heldout, 4) == pytest.approx(expected, rel=1e-5)
    dense = copy.deepcopy(session().model)
    for layer in (dense.get_submodule(name) for name in trained.layers):
        layer.mode = Mode.DENSE
    with torch.no_grad():
        expected = float(dense(input_ids=text.heldout, labels=text.heldout).loss)
    assert heldout_nll(trained, text.heldout, 4, Mode.DENSE) == pytest.approx(expected, rel=1e-5)


def test_a_prior_reaches_its_layer() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {name: layer.weight.shape for name, layer in session().layers.items()}
    masks = {name: PATTERN.mask_from_scores(torch.rand(shape, generator=generator)) for name, shape in shapes.items()}
    begun = session(prior=masks.__getitem__)
    assert all(torch.equal(layer.mask(), masks[name]) for name, layer in begun.layers.items())


def test_layers_are_numbered_and_keep_their_names() -> None:
    begun = session()
    assert [layer.index for layer in begun.layers.values()] == list(range(len(begun.layers)))
    assert all(begun.model.get_submodule(name) is layer for name, layer in begun.layers.items())
    assert {layer.pattern for layer in begun.layers.values()} == {NMPattern(2, 4)}
    assert dataclasses.replace(begun.context) == begun.context


def method(name: str, **options: Any) -> LearnedMethod:
    made = create(name, options)
    assert isinstance(made, LearnedMethod)
    return made


def prior_mask(name: str) -> Tensor:
    weight_OI = dict(session().model.named_parameters())[f"{name}.weight"]
    return PATTERN.mask_from_scores(torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(1)))


def test_blocks_learn_while_the_others_keep_the_prior() -> None:
    trained = session(method("maskllm", weight_reward=0.0), prior=prior_mask, blocks=(1, 2), lr=1.0)
    assert trained.learning.keys() < trained.layers.keys()
    assert all(name.startswith("model.layers.1.") for name in trained.learning)
    assert {id(item) for item in trained.parameters} == {id(item) for item in learned_parameters(trained.learning)}
    for _ in range(4):
        trained.run_step(corpus(), 4)
    kept = {name: torch.equal(layer.mask(), prior_mask(name)) for name, layer in trained.layers.items()}
    assert {name for name, same in kept.items() if same} == trained.layers.keys() - trained.learning.keys()


def test_a_fixed_layer_is_the_masked_one_in_training_too() -> None:
    trained = session(method("maskllm"), prior=prior_mask, blocks=(1, 2))
    name, layer = next(iter(trained.layers.items()))
    x = torch.randn(3, layer.in_features)
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, layer.weight * prior_mask(name), layer.bias))
    layer.mode = Mode.DENSE
    assert not torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fixed_layer_keeps_no_product(dtype: str) -> None:
    """Its gradient is that of the plain product, and what waits for the backward pass exists already."""
    trained = session(method("maskllm"), prior=prior_mask, blocks=(1, 2))
    layer = next(iter(trained.layers.values()))
    assert isinstance(layer, FixedLinear)
    there = {tensor.data_ptr() for tensor in (layer.weight, layer.get_buffer("kept_OI"))}
    saved: list[Tensor] = []
    gradients = []
    for forward in (layer.train_forward, layer.hard_forward):
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda it: it)
        with hooks, autocast(x.device, getattr(torch, dtype)):
            y = forward(x)
        if forward == layer.train_forward:
            assert saved and {tensor.data_ptr() for tensor in saved} <= there
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_is_the_model_before_training(dtype: str) -> None:
    """A copy of its own, cast, but for buffers: rotary frequencies lose too much in bfloat16."""
    trained = session(Toy(learns_weights=True), "llama_tied", distill_weight=0.5, dtype=dtype, scope="all")
    teacher, given = trained.objective.teacher, models.build("llama_tied")
    assert teacher is not None and teacher.lm_head.weight is teacher.model.embed_tokens.weight
    taught, own = dict(teacher.named_parameters()), {tensor.data_ptr() for tensor in trained.model.parameters()}
    for name, parameter in given.named_parameters():
        assert torch.equal(taught[name], parameter.to(getattr(torch, dtype))) and not taught[name].requires_grad
    assert not own & {tensor.data_ptr() for tensor in taught.values()}
    assert {buffer.dtype for buffer in teacher.buffers()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "spec", "problem"),
    [
        ("maskllm", {"blocks": (0, 9)}, r"blocks \[0, 9\]: the model has 3 blocks"),
        ("adaptive_sparse", {"blocks": (0, 1)}, r"blocks \[0, 1\]: .* needs a method that starts from one"),
        ("maskllm", {"blocks": (0, 1), "scope": "all"}, "scope = 'targets'"),
    ],
)
def test_blocks_that_cannot_be(name: str, spec: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        session(method(name), prior=prior_mask if name == "maskllm" else None, **spec)
