"""Solving a block stage by stage beside the dense one: the stages, what is observed, and what comes of it.

Legend: B = batch, T = tokens, D = hidden size, I = in features.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskgen.hf.blocks import BlockCall, Recording
from maskgen.methods import Drift
from maskgen.methods.oneshot.admm import ADMM
from maskgen.recipes.recipe import Recipe
from maskgen.sweep.asymmetric import BesideDense, paths_in
from maskgen.sweep.reconstruct import Teacher
from maskgen.sweep.wiring import Wiring
from tests import models
from tests.maskgen.blocks import Experts, Two
from tests.maskgen.sweeping import recipe, run, windows

CPU = torch.device("cpu")
METHOD = ADMM(asymmetric=True)


def beside(block: nn.Module, dense_shift: float = 0.0) -> BesideDense:
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(size, 6, 8, generator=generator) for size in (2, 2, 1)]
    recording = Recording(hidden, {size: [BlockCall((), {})] for size in (1, 2)})
    teacher = Teacher([hidden_BTD + dense_shift for hidden_BTD in hidden], [])
    layers = {f"model.3.{name}": layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    wiring = Wiring.of(block, list(paths_in(block, layers).values()), hidden[0], recording.call(0, 0), CPU)
    return BesideDense.of(METHOD, block, 0, layers, wiring, recording, teacher, CPU)


def names(*ends: str) -> list[str]:
    return [f"model.3.{end}" for end in ends]


@torch.no_grad()
def test_a_writer_learns_what_the_stream_in_front_of_it_lacks() -> None:
    block = Two()
    at_work = beside(block, dense_shift=0.5)
    assert at_work.writers == names("first", "second")
    block.first.weight.data.zero_()
    x_TI = torch.cat([hidden_BTD.flatten(0, 1) for hidden_BTD in at_work.recording.hidden])
    first = at_work.observe(names("first")).take("model.3.first")
    torch.testing.assert_close(first.missing_OI, torch.full_like(x_TI, 0.5).T @ x_TI)
    second = at_work.observe(names("second")).take("model.3.second")
    before_TI = x_TI + block.first.bias
    dense_TI = x_TI + 0.5 + at_work.dense.get_submodule("first")(x_TI + 0.5)
    torch.testing.assert_close(second.missing_OI, (dense_TI - before_TI).T @ before_TI)


@torch.no_grad()
def test_the_drift_is_that_of_the_same_tokens() -> None:
    at_work = beside(Experts(), dense_shift=0.5)
    stats = at_work.observe(names("mix")).take("model.3.mix")
    x_TI = torch.cat([hidden_BTD.flatten(0, 1) for hidden_BTD in at_work.recording.hidden])
    torch.testing.assert_close(stats.sum_II, x_TI.T @ x_TI)
    torch.testing.assert_close(stats.drift_II, torch.full_like(x_TI, 0.5).T @ x_TI)


@torch.no_grad()
def test_a_layer_that_sees_some_tokens_only_has_no_drift() -> None:
    """Routers may send other tokens to an expert when the model is pruned."""
    at_work = beside(Experts(), dense_shift=0.5)
    inputs = at_work.observe(names("experts.0.fc1", "experts.0.gate"))
    assert inputs.take("model.3.experts.0.fc1").drift_II is None


@torch.no_grad()
def test_a_stage_is_observed_with_what_was_put_in_before_it() -> None:
    block = Experts()
    at_work = beside(block)
    dense = at_work.observe(names("experts.0.fc2")).take("model.3.experts.0.fc2").sum_II
    block.mix.weight.data.mul_(2)
    block.mix.bias.data.mul_(2)
    doubled = at_work.observe(names("experts.0.fc2")).take("model.3.experts.0.fc2").sum_II
    assert (doubled != dense).all()
    assert not torch.equal(at_work.dense.get_submodule("mix").weight, block.mix.weight)


@torch.no_grad()
def plain_sweep(model: nn.Module, wanted: Recipe, data: Tensor) -> dict[str, Tensor]:
    """Whole-model forwards of the dense and the pruned model for every stage of every block."""
    method, masks, dense = wanted.local_method(), {}, copy.deepcopy(model)

    def inputs(of: nn.Module, name: str) -> Tensor:
        seen: list[Tensor] = []
        layer = of.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).clone()))
        for batch in data.split(wanted.calibration.batch):
            of(batch)
        handle.remove()
        return torch.cat(seen)

    ends = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
    streams = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    for index in range(models.LAYERS):
        for stage in ends:
            solutions = {}
            for name in (f"model.layers.{index}.{end}" for end in stage):
                x_TI, missing_TD = inputs(model, name), None
                if stream := streams.get(name.partition(f"layers.{index}.")[2]):
                    missing_TD = inputs(dense, f"model.layers.{index}.{stream}") - inputs(
                        model, f"model.layers.{index}.{stream}"
                    )
                drift = Drift(inputs(dense, name) - x_TI, missing_TD)
                stats: Any = method.observe_drift(method.observe(None, x_TI), x_TI, drift)
                solutions[name] = method.solve(model.get_submodule(name).weight, stats, wanted.pattern)
            for name, solution in solutions.items():
                masks[name] = solution.mask
                model.get_submodule(name).weight.copy_(solution.weight)
    return masks


def test_equals_the_plain_sweep(tmp_path: Path) -> None:
    wanted = recipe("admm", "method.asymmetric=true")
    plain, model = models.build("llama"), models.build("llama")
    masks = plain_sweep(plain, wanted, windows())
    report, work = run(model, wanted, tmp_path / "work")
    assert set(report.targets) == set(masks)
    same = [float((work.packed(name).mask() == mask_OI).float().mean()) for name, mask_OI in masks.items()]
    assert min(same) > 0.999, "sums of another order may turn a tie round"
    for name in masks:
        error = (model.get_submodule(name).weight - plain.get_submodule(name).weight).norm()
        assert error < 0.02 * plain.get_submodule(name).weight.norm(), name


@pytest.mark.parametrize("kind", models.BUILDERS)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    model = models.build(kind, dtype=torch.bfloat16)
    report, work = run(model, recipe("admm", "method.asymmetric=true"), tmp_path / "work")
    _, other = run(models.build(kind, dtype=torch.bfloat16), recipe("admm", "method.asymmetric=false"), tmp_path / "b")
    alike = [torch.equal(work.packed(name).values, other.packed(name).values) for name in report.targets]
    assert not all(alike) and alike[0], "the first layer reads what it does in the dense model"
    for name in report.targets:
        work.form.pattern.check_mask(work.packed(name).mask(), name)
    with torch.no_grad():
        assert torch.isfinite(model(windows()[:1]).logits).all()


def test_outputs_come_nearer_to_those_of_the_dense_model(tmp_path: Path) -> None:
    """On the calibration windows, which is what is solved for."""
    dense, data = models.build("llama"), windows(40)
    with torch.no_grad():
        wanted_BTV = dense(data).logits
    errors = []
    for asymmetric in ("false", "true"):
        model = models.build("llama")
        run(model, recipe("admm", f"method.asymmetric={asymmetric}"), tmp_path / asymmetric, data)
        with torch.no_grad():
            errors.append(float((model(data).logits - wanted_BTV).norm()))
    assert errors[1] < 0.98 * errors[0]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    wanted = recipe("admm", "method.asymmetric=true")

    class Killed(Exception):
        pass

    def kill(progress: Any) -> None:
        if progress.block == 1 and progress.what.endswith("gate_proj"):
            raise Killed

    whole, resumed = models.build("llama"), models.build("llama")
    run(whole, wanted, tmp_path / "whole")
    with pytest.raises(Killed):
        run(models.build("llama"), wanted, tmp_path / "work", progress=kill)
    report, _ = run(resumed, wanted, tmp_path / "work")
    assert report.resumed_blocks == 1
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
