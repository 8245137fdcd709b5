"""Every file of `maskgen/methods/learned` keeps the contract of that folder. A new file is tested at once.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import maskgen.methods
from maskgen.core import registry
from maskgen.core.pattern import NMPattern
from maskgen.methods import create
from maskgen.methods.learned import LearnedMethod, Mode, Result
from maskgen.recipes import recipe
from maskgen.train.checkpoints import Checkpoints
from maskgen.train.objective import in_mode
from maskgen.train.step import Session
from tests import models
from tests.maskgen.training import assert_same, corpus, session, state

NAMES = [
    name
    for name in registry.names(maskgen.methods)
    if issubclass(registry.load(maskgen.methods, name).METHOD, LearnedMethod)
]
RECIPES = {name: recipe.load(name) for name in recipe.names()}
CASES = [name for name, shipped in RECIPES.items() if shipped.method.name in NAMES]
"""Shipped recipes: every method, and every form of it that somebody has a name for."""
SPARSE = [name for name in CASES if RECIPES[name].build_method().result is Result.SPARSE]
FOR_TINY_MODELS = {"maskprune": {"ffn_multiple": 16}, "structured": {"ffn_multiple": 16}}
PATTERN = NMPattern(2, 4)
RUN = "sha256:" + "7" * 64

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def method_of(name: str) -> LearnedMethod:
    spec = RECIPES[name].method
    method = create(spec.name, {**spec.options, **FOR_TINY_MODELS.get(spec.name, {})})
    assert isinstance(method, LearnedMethod)
    return method


def begin(name: str, pattern: NMPattern = PATTERN, **spec: object) -> Session:
    method = method_of(name)
    model = models.build("llama")
    weights = dict(model.named_parameters())

    def prior(layer: str) -> Tensor:
        return pattern.mask_from_scores(weights[f"{layer}.weight"].detach().abs())

    options = {"steps": 5, "lr": 1e-2, "distill_weight": 0.5, **spec}
    return session(method, prior=prior if method.uses_prior else None, pattern=pattern, **options)


def advance(of: Session, steps: int = 3) -> Session:
    for _ in range(steps):
        of.run_step(corpus(), 2)
    return of


def inputs(features: int) -> Tensor:
    return torch.randn(5, features, generator=torch.Generator().manual_seed(4))


def test_there_are_some() -> None:
    assert {"maskllm", "proxsparse", "adaptive_sparse", "maskprune", "dense_control"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_a_frozen_method_with_defaults_and_a_recipe(name: str) -> None:
    method = registry.load(maskgen.methods, name).METHOD
    assert method.__dataclass_params__.frozen
    assert method() == create(name, {field.name: field.default for field in dataclasses.fields(method)})
    own = [shipped for shipped in RECIPES.values() if shipped.method.name == name]
    assert own, f"no recipe in maskgen/recipes uses {name}"
    assert all(shipped.train is not None for shipped in own)
    assert all((shipped.prior is not None) <= shipped.build_method().uses_prior for shipped in own)


@pytest.mark.parametrize("name", NAMES)
def test_imports_only_what_a_method_may_see(name: str) -> None:
    source = Path(inspect.getfile(registry.load(maskgen.methods, name).METHOD)).read_text("utf-8")
    ours = [line.split()[1] for line in source.splitlines() if line.startswith(("from maskgen", "import maskgen"))]
    allowed = {"maskgen.methods", "maskgen.methods.learned"}
    assert ours and all(module in allowed or module.startswith(("maskgen.core", "maskgen.numerics")) for module in ours)


@pytest.mark.parametrize("name", CASES)
def test_dense_mode_is_the_layer_as_it_was(name: str) -> None:
    begun, given = begin(name), models.build("llama")
    ids_BT = corpus().heldout
    with torch.no_grad(), in_mode(begun.layers, Mode.DENSE):
        assert torch.equal(begun.model(input_ids=ids_BT).logits, given(input_ids=ids_BT).logits)
    advance(begun)
    original = dict(given.named_parameters())
    unchanged = all(torch.equal(layer.weight, original[f"{key}.weight"]) for key, layer in begun.layers.items())
    assert unchanged == (not begun.method.trains_weights)
    if not begun.method.trains_weights:
        with torch.no_grad(), in_mode(begun.layers, Mode.DENSE):
            assert torch.equal(begun.model(input_ids=ids_BT).logits, given(input_ids=ids_BT).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 3])
def test_hard_mode_is_what_is_exported(name: str, steps: int) -> None:
    with torch.enable_grad():
        trained = advance(begin(name), steps)
    for key, layer in trained.layers.items():
        x, solution = inputs(layer.in_features), layer.solution()
        weight_OI = layer.weight if solution.weight is None else solution.weight
        assert solution.mask.dtype == torch.bool and solution.mask.shape == weight_OI.shape == layer.weight.shape
        expected = linear(x, weight_OI * solution.mask, layer.bias)
        if solution.correction is not None:
            expected += x @ solution.correction.dense(layer.in_features).T
        layer.mode = Mode.HARD
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        layer.mode = Mode.TRAIN
        assert torch.equal(layer.mask(), solution.mask)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)], ids=str)
def test_masks_are_legal_from_the_first_step_to_the_last(name: str, pattern: NMPattern) -> None:
    trained = begin(name, pattern, steps=2)
    for _ in range(3):
        for key, layer in trained.layers.items():
            pattern.check_mask(layer.mask(), key)
        if trained.step < 2:
            advance(trained, 1)


@pytest.mark.parametrize("name", CASES)
def test_two_runs_have_the_same_bits_and_something_is_learned(name: str) -> None:
    first, second, begun = advance(begin(name)), advance(begin(name)), state(begin(name))
    assert_same(state(first), state(second))
    moved = {key for key, tensor in state(first).items() if not torch.equal(tensor, begun[key])}
    assert moved
    frozen = {key for key, parameter in first.model.named_parameters() if not parameter.requires_grad}
    assert not frozen & moved


@pytest.mark.parametrize("name", CASES)
def test_looking_at_the_answer_changes_nothing(name: str) -> None:
    looked_at, left_alone = advance(begin(name), 1), advance(begin(name), 1)
    for layer in looked_at.layers.values():
        layer.solution()
        layer.mask()
    looked_at.method.kept_units(looked_at.layers)
    with torch.no_grad(), in_mode(looked_at.layers, Mode.HARD):
        looked_at.model(input_ids=corpus().heldout)
    assert_same(state(advance(looked_at, 1)), state(advance(left_alone, 1)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stop", [1, 4])
def test_all_state_is_in_tensors_that_a_checkpoint_holds(name: str, stop: int, tmp_path: Path) -> None:
    stopped = advance(begin(name), stop)
    Checkpoints(tmp_path, RUN).save(stopped, {})
    resumed = begin(name)
    assert Checkpoints(tmp_path, RUN).restore(resumed, {})
    whole = advance(stopped, 5 - stop)
    assert_same(state(whole), state(advance(resumed, 5 - stop)))
    for key, layer in whole.layers.items():
        one, other = layer.solution(), resumed.layers[key].solution()
        assert torch.equal(one.mask, other.mask)
        assert (one.weight is None) == (other.weight is None)
        assert one.weight is None or other.weight is None or torch.equal(one.weight, other.weight)
    one, other = (of.method.kept_units(of.layers) for of in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_of_the_kind_it_says(name: str) -> None:
    trained = advance(begin(name, steps=5), 5)
    kept = trained.method.kept_units(trained.layers)
    masks = [layer.mask() for layer in trained.layers.values()]
    if trained.method.result is Result.SLICED:
        assert kept and all(units.dtype == torch.bool and units.any() for units in kept.values())
    else:
        assert not kept
        assert all(mask.all() for mask in masks) == (trained.method.result is Result.DENSE)
