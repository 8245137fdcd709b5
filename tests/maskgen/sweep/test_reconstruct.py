"""Blocks that are trained when they are pruned: against whole-model forward passes, killed, wrong, and of every kind.

Legend: B = windows, T = tokens, D = hidden size, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.hf.planning import plan
from maskgen.methods.blockwise.reconstruct import Reconstruct
from maskgen.sweep.reconstruct import Fitted, report
from maskgen.sweep.report import Progress
from tests import models
from tests.families import FAMILIES
from tests.maskgen.sweeping import recipe, run, windows

SHORT = ("prior.name=sparsegpt", "calibration.samples=10", "method.epochs=3", "method.lr=0.02", "method.dtype=float32")
WANTED = recipe("reconstruct", *SHORT, "calibration.window_tokens=24", "calibration.batch=4")
PRUNED = recipe("sparsegpt")


@torch.no_grad()
def block_outputs(model: nn.Module, data: Tensor) -> list[Tensor]:
    """What each block of a whole model puts out, `[B, T, D]`."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *call: found.append(call[2])) for block in model.model.layers]
    model(data)
    for handle in handles:
        handle.remove()
    return found


def loss(outputs: Tensor, wanted: Tensor) -> float:
    """The loss, as batches of 4, 4 and 2 windows have it."""
    parts = zip(outputs.split(4), wanted.split(4), strict=True)
    return sum(float(Reconstruct().loss(*part)) for part in parts) / 3


def test_the_losses_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """The targets are the dense model's outputs and the inputs those of the pruned blocks before."""
    dense, fitted_model, pruned = (models.build("llama") for _ in range(3))
    done, _ = run(fitted_model, WANTED, tmp_path / "fitted")
    run(pruned, PRUNED, tmp_path / "pruned")
    wanted, after, before = (block_outputs(model, windows()) for model in (dense, fitted_model, pruned))
    assert list(done.fitted) == list(range(models.LAYERS))
    assert done.fitted[0].before == pytest.approx(loss(before[0], wanted[0]), rel=1e-4)
    for index, fitted in done.fitted.items():
        assert fitted.after < fitted.before
        assert fitted.after == pytest.approx(loss(after[index], wanted[index]), rel=1e-4)
        assert fitted.after < 0.9 * loss(before[index], wanted[index])


@pytest.mark.parametrize("kind", models.BUILDERS)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    wanted = recipe("reconstruct", *SHORT, "method.dtype=bfloat16", "calibration.window_tokens=24")
    model, dense = (models.build(kind, dtype=torch.bfloat16) for _ in range(2))
    done, work = run(model, wanted, tmp_path / "work")
    assert all(fitted.after < fitted.before for fitted in done.fitted.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        assert tensor.dtype == torch.bfloat16
        if layer not in done.targets:
            assert torch.equal(tensor, dense.state_dict()[name]), name
        else:
            packed = work.packed(layer)
            wanted.pattern.check_mask(packed.mask(), name)
            assert torch.equal(tensor, packed.unpack()) and not torch.signbit(tensor[~packed.mask()]).any()


def test_the_first_mask_is_the_priors(tmp_path: Path) -> None:
    _, fitted = run(models.build("llama"), WANTED, tmp_path / "fitted")
    _, pruned = run(models.build("llama"), PRUNED, tmp_path / "pruned")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        assert torch.equal(fitted.packed(name).mask(), pruned.packed(name).mask())
        assert not torch.equal(fitted.packed(name).values, pruned.packed(name).values)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "admm"])
def test_any_one_shot_method_may_come_first(name: str, tmp_path: Path) -> None:
    done, _ = run(models.build("llama"), recipe("reconstruct", *SHORT, f"prior={{name='{name}'}}"), tmp_path / "work")
    assert all(fitted.after < fitted.before for fitted in done.fitted.values())


@pytest.mark.parametrize("what", ["reconstruction, epoch 2 of 3", "block done"])
@pytest.mark.parametrize("block", range(models.LAYERS))
def test_a_run_interrupted_anywhere_continues_to_the_same_bits(block: int, what: str, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.block == block and progress.what.startswith(what):
            raise KeyboardInterrupt

    whole, resumed = (models.build("llama", dtype=torch.bfloat16) for _ in range(2))
    reference, _ = run(whole, WANTED, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(models.build("llama", dtype=torch.bfloat16), WANTED, tmp_path / "work", progress=interrupt)
    done, _ = run(resumed, WANTED, tmp_path / "work")
    assert done.resumed_blocks == block + (what == "block done")
    assert done.fitted == reference.fitted
    for number in range(models.LAYERS):
        name = f"block-{number:05d}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "work" / name).read_bytes()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


@pytest.mark.parametrize("inputs", ["dense", "mixed"])
def test_other_inputs_make_other_weights(inputs: str, tmp_path: Path) -> None:
    _, usual = run(models.build("llama"), WANTED, tmp_path / "usual")
    other = recipe("reconstruct", *SHORT, f"method.inputs={inputs}")
    done, work = run(models.build("llama"), other, tmp_path / "other")
    first, later = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    assert torch.equal(usual.packed(first).values, work.packed(first).values), "the first block's inputs are one"
    assert not torch.equal(usual.packed(later).values, work.packed(later).values)
    assert all(fitted.after < fitted.before for fitted in done.fitted.values())


def test_training_that_does_not_help_is_undone(tmp_path: Path) -> None:
    harmful = recipe("reconstruct", *SHORT, "method.lr=5.0", "method.epochs=1")
    model, pruned = models.build("llama"), models.build("llama")
    done, _ = run(model, harmful, tmp_path / "fitted")
    run(pruned, PRUNED, tmp_path / "pruned")
    assert all(fitted.after == fitted.before for fitted in done.fitted.values())
    for key, tensor in pruned.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_loss_that_is_not_finite_names_the_block(tmp_path: Path) -> None:
    wild = recipe("reconstruct", *SHORT, "method.lr=1e30", "method.warmup=0.0")
    with pytest.raises(NumericalError, match=r"block 0: the loss of its reconstruction is (inf|nan) in epoch 1; lower"):
        run(models.build("llama"), wild, tmp_path / "work")
    assert not list((tmp_path / "work").glob("block-*"))


def test_a_block_that_stays_dense_is_not_trained_but_run(tmp_path: Path) -> None:
    wanted = recipe("reconstruct", *SHORT, "ignore=['model.layers.1.*', 'model.layers.2.self_attn.*']")
    dense, model = models.build("llama"), models.build("llama")
    done, _ = run(model, wanted, tmp_path / "work")
    assert set(done.fitted) == {0, 2}
    outputs, targets = block_outputs(model, windows()), block_outputs(dense, windows())
    assert done.fitted[2].after == pytest.approx(loss(outputs[2], targets[2]), rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_blocks_with_experts(name: str, tmp_path: Path) -> None:
    model = models.randomise(AutoModelForCausalLM.from_config(FAMILIES[name].config())).requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    done, _ = run(model, recipe("reconstruct", *SHORT), tmp_path / "work")
    assert done.fitted and all(fitted.after < fitted.before for fitted in done.fitted.values())
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {target + ".weight" for target in done.targets}


def given(model: nn.Module, kind: str) -> tuple[Callable[[str], Tensor], Callable[[str], Tensor]]:
    """Masks by magnitude, and weights that no dense model has."""

    def mask(name: str) -> Tensor:
        return WANTED.pattern.mask_from_scores(weights[name].abs())

    weights: Mapping[str, Tensor] = {
        name: linear.weight.detach().clone() * 1.25
        for block in plan(model, WANTED.pattern).targets
        for name, linear in block.items()
    }
    return mask, lambda name: weights[name] if kind == "weights" else pytest.fail("not asked for")


@pytest.mark.parametrize("kind", ["masks", "weights"])
def test_starts_from_given_masks_and_weights(kind: str, tmp_path: Path) -> None:
    """A step too small to see leaves the start as it was: the given weights, or the dense ones under the given mask."""
    dense, model = models.build("llama"), models.build("llama")
    mask, weight = given(dense, "weights")
    idle = recipe("reconstruct", *SHORT, "method.lr=1e-30")
    options = {"prior": mask, "prior_digest": "sha256:1"} | ({"prior_weight": weight} if kind == "weights" else {})
    done, work = run(model, idle, tmp_path / "idle", **options)
    assert not done.fitted[0].after > done.fitted[0].before
    for name in done.targets:
        expected = weight(name) if kind == "weights" else dense.get_submodule(name).weight
        assert torch.equal(work.packed(name).mask(), mask(name))
        assert torch.equal(model.get_submodule(name).weight, torch.where(mask(name), expected, 0.0)), name
    done, work = run(models.build("llama"), WANTED, tmp_path / "work", **options)
    assert all(fitted.after < fitted.before for fitted in done.fitted.values())
    assert all(torch.equal(work.packed(name).mask(), mask(name)) for name in done.targets)


def test_a_recipe_without_a_start_needs_masks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"reconstruct starts from a mask: give `prior`, or a \[prior\] section"):
        run(models.build("llama"), WANTED.model_copy(update={"prior": None}), tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_the_report_is_one_line_for_each_block() -> None:
    assert report({}) == {}
    (value,) = report({2: Fitted(0.5, 0.25), 0: Fitted(1.0, 1.0)}).values()
    assert value == {"blocks": [{"block": 0, "before": 1.0, "after": 1.0}, {"block": 2, "before": 0.5, "after": 0.25}]}
