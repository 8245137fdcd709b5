"""What layers cost: derivatives against differences of the whole model's divergence, and their sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from maskgen.core.pattern import NMPattern
from maskgen.hf.planning import plan
from maskgen.hf.pruning_cost import HeldOutText
from maskgen.sweep import sensitivity
from maskgen.sweep.report import Progress
from maskgen.sweep.sensitivity import Probe, costs, mixture
from tests import models
from tests.maskgen.arithmetic import processor_has_bfloat16

PATTERN = NMPattern(2, 4)
IDS = torch.randint(models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(5))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Sparse weights of every layer: the larger half of each group."""
    targets = [item for block in plan(model, PATTERN).targets for item in block.items()]
    return {name: linear.weight * PATTERN.mask_from_scores(linear.weight.abs()) for name, linear in targets}


def probe(model: nn.Module) -> Probe:
    return Probe.of(model, plan(model, PATTERN), HeldOutText(IDS, 0, ["text"]), "cpu")


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module) -> float:
    """KL(dense || model) of whole models, over every token."""
    found, wanted = (one(IDS).logits.double().log_softmax(-1) for one in (model, dense))
    return float(kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean())


@torch.no_grad()
def moved(kind: str, part: dict[str, float]) -> nn.Module:
    """A dense model with each layer moved by a part of the way to its sparse weight."""
    model = models.build(kind)
    sparse = weights(model)
    for name, linear in (item for block in plan(model, PATTERN).targets for item in block.items()):
        linear.weight.copy_(torch.lerp(linear.weight, sparse[name], part.get(name, part["all"])))
    return model


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox"])
def test_a_term_is_the_slope_of_the_divergence(kind: str) -> None:
    dense = models.build(kind).requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    sparse = weights(dense)
    terms = sensitivity._derivatives(probe(dense), lambda name: sparse[name], 0.6, lambda block: None)
    assert set(terms) == set(sparse)
    for name in list(sparse)[:: len(sparse) // 4]:
        higher, lower = (divergence(moved(kind, {"all": 0.6, name: 0.6 + step}), dense) for step in (1e-2, -1e-2))
        assert terms[name] == pytest.approx((higher - lower) / 2e-2, rel=0.05, abs=1e-4)
    assert all(torch.equal(before[name], parameter) for name, parameter in dense.named_parameters())
    assert not any(parameter.requires_grad for parameter in dense.parameters())


def test_costs_sum_up_to_the_divergence_and_go_on_where_they_stopped() -> None:
    dense = models.build("llama")
    sparse, told = weights(dense), []
    known: list[dict[str, float]] = []
    costs(probe(dense), lambda name: sparse[name], known, told.append, lambda: None)
    total = sum(cost for point in known for cost in point.values())
    assert total == pytest.approx(divergence(moved("llama", {"all": 1.0}), dense), rel=0.05)
    again = known[:2]
    costs(probe(dense), lambda name: sparse[name], again, told.append, lambda: None)
    assert again == known
    assert len(told) == (sensitivity.POINTS + 1) * models.LAYERS
    assert all(isinstance(event, Progress) for event in told)


def test_a_mixture_is_compared_as_the_whole_model_is() -> None:
    dense = models.build("llama")
    sparse, look = weights(dense), probe(dense)
    kept = {name for name in sparse if ".0." in name}
    *_, outputs = look.forward(mixture(look, lambda name: float(name not in kept), lambda name: sparse[name]))
    found = look.compare(outputs).divergence
    part = {"all": 1.0, **dict.fromkeys(kept, 0.0)}
    with torch.no_grad():
        q, p = (model(IDS).logits[:, :-1].double().log_softmax(-1) for model in (moved("llama", part), dense))
    assert found is not None
    assert found.kl == pytest.approx(float(kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize(("fast", "products"), [(True, torch.bfloat16), (False, torch.float32)])
def test_blocks_are_multiplied_in_what_the_processor_is_fast_in(
    fast: bool, products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has_bfloat16(monkeypatch, fast)
    assert probe(models.build("llama").bfloat16()).recording.call(0, 0).products is products
