"""The block-by-block driver against the plainest possible sweep, and its promises about memory and errors.

Legend: O = out features, I = in features, S = windows, T = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from maskgen.core.errors import NumericalError, RecipeError
from maskgen.core.layout import LayerForm
from maskgen.core.pattern import NMPattern
from maskgen.hf.dense import OUTSIDE
from maskgen.hf.planning import plan
from maskgen.methods import LocalMethod, Solution
from maskgen.recipes.recipe import Recipe
from maskgen.sweep.driver import sweep
from maskgen.sweep.layers import solve_layer
from maskgen.sweep.report import Progress
from tests import models
from tests.maskgen.sweeping import BASE, recipe, run, windows


@torch.no_grad()
def plain_sweep(model: nn.Module, wanted: Recipe, data: Tensor) -> dict[str, Tensor]:
    """Whole-model forwards in float32, one hook and one set of statistics per layer, no sharing, nothing cached."""
    method, masks = wanted.build_method(), {}
    for block in model.model.layers:
        names = {layer: name for name, layer in model.named_modules()}
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        stats: dict[nn.Module, Any] = dict.fromkeys(layers)

        def observe(layer: nn.Module, args: tuple[Tensor, ...], stats: dict[nn.Module, Any] = stats) -> None:
            stats[layer] = method.observe(stats[layer], args[0].reshape(-1, args[0].shape[-1]))

        hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
        for batch in data.split(wanted.calibration.batch):
            model(batch)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            solution = method.solve(layer.weight, stats[layer], wanted.pattern)
            weight = layer.weight if solution.weight is None else solution.weight
            masks[names[layer]] = solution.mask
            layer.weight.copy_(torch.where(solution.mask, weight, 0.0))
    return masks


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt", "sparsegpt-mask-only", "admm"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_equals_the_plain_sweep(name: str, pattern: str, tmp_path: Path) -> None:
    symmetric = ["method.asymmetric=false"] if name == "admm" else []  # test_asymmetric has the other
    wanted = recipe(name, f"pattern={pattern}", *symmetric)
    plain, model = models.build("llama"), models.build("llama")
    masks = plain_sweep(plain, wanted, windows())
    report, work = run(model, wanted, tmp_path / "work")
    assert set(report.targets) == set(masks)
    for layer, mask_OI in masks.items():
        assert torch.equal(work.packed(layer).mask(), mask_OI), layer
    for name_of, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name_of], tensor), name_of


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", models.BUILDERS)
def test_every_architecture(kind: str, name: str, tmp_path: Path) -> None:
    wanted = recipe(name)
    model, dense = (models.build(kind, dtype=torch.bfloat16) for _ in range(2))
    report, work = run(model, wanted, tmp_path / "work")
    before, after = dense.state_dict(), model.state_dict()
    targets = {layer + ".weight" for layer in report.targets}
    for key, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        if key not in targets:
            assert torch.equal(tensor, before[key]), key
            continue
        packed = work.packed(key.removesuffix(".weight"))
        mask_OI = packed.mask()
        wanted.pattern.check_mask(mask_OI, key)
        assert torch.equal(tensor, packed.unpack())
        assert not torch.signbit(tensor[~mask_OI]).any()
        if name == "wanda":
            assert torch.equal(tensor[mask_OI], before[key][mask_OI])
    assert report.million_weights == pytest.approx(sum(after[key].numel() for key in targets) / 1e6)
    assert set(report.solve_s) == set(report.targets) and report.s_per_million_weights > 0
    assert dict(report.ignored) == {"lm_head": OUTSIDE}
    with torch.no_grad():
        assert torch.isfinite(model(windows()[:1]).logits).all()


def test_errors_of_earlier_blocks_are_seen_by_later_ones(tmp_path: Path) -> None:
    """Pruning block 0 must change what block 2 is solved for."""
    _, work = run(models.build("llama"), recipe("wanda"), tmp_path / "all")
    _, only = run(models.build("llama"), recipe("wanda", "ignore=['model.layers.0.*']"), tmp_path / "some")
    layer = "model.layers.2.mlp.down_proj"
    assert not torch.equal(work.packed(layer).mask(), only.packed(layer).mask())


@dataclass(frozen=True)
class Recorder(LocalMethod):
    """Keeps every tensor it is shown; for counting."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def observe(self, stats: Any, x_TI: Tensor) -> Any:
        assert x_TI.dtype == torch.float32 and x_TI.ndim == 2
        self.seen.append(tuple(x_TI.shape))
        return (stats or 0) + len(x_TI)

    def solve(self, weight_OI: Tensor, stats: Any, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
        assert stats == 240
        return Solution(pattern.mask_from_scores(weight_OI.abs()))


def test_layers_with_one_input_are_observed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "build_method", lambda self: Recorder())
    Recorder.seen.clear()
    run(models.build("llama", dtype=torch.bfloat16), recipe("wanda"), tmp_path / "work")
    per_batch = [(96, 64), (96, 64), (96, 64), (96, 96)]
    assert Recorder.seen == ([*per_batch, *per_batch, *[(48, size) for _, size in per_batch]]) * models.LAYERS


def test_only_the_block_at_work_is_in_float32(tmp_path: Path) -> None:
    model = models.build("llama", dtype=torch.bfloat16)
    upcast: list[set[int]] = []
    events: list[Progress] = []

    def watch(progress: Progress) -> None:
        events.append(progress)
        layers = enumerate(model.model.layers)
        upcast.append({index for index, block in layers if block.mlp.up_proj.weight.dtype == torch.float32})
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16

    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    run(model, recipe("sparsegpt"), tmp_path / "work", progress=watch)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert all(active <= {event.block} for active, event in zip(upcast, events, strict=True))
    assert any(upcast)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [event.what for event in events if event.block == 1] == [
        "calibration inputs",
        *(f"model.layers.1.self_attn.{kind}_proj" for kind in "qkvo"),
        *(f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        "block done",
    ]
    assert all(event.blocks == models.LAYERS and event.peak_rss_bytes > 1 << 20 for event in events)


def test_a_method_without_data_never_runs_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("llama")
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    report, _ = sweep(model, plan(model, NMPattern(2, 4)), recipe("magnitude"), None, tmp_path / "work", BASE)
    assert len(report.targets) == 7 * models.LAYERS


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@torch.no_grad()
def test_damaged_weights_are_named(name: str, tmp_path: Path) -> None:
    model = models.build("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    layer = r"model\.layers\.1\.mlp\.(up_proj: weight: NaN|down_proj: .*NaN)"
    with pytest.raises(NumericalError, match=layer):
        run(model, recipe(name), tmp_path / "work")


@torch.no_grad()
def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    model = models.build("llama")
    model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(NumericalError, match="output of block 0: NaN or infinity"):
        run(model, recipe("wanda"), tmp_path / "work")


def test_rounding_to_the_stored_dtype_can_overflow() -> None:
    class Blow(Recorder):
        def solve(self, weight_OI: Tensor, stats: Any, pattern: NMPattern, prior_OI: Tensor | None = None) -> Solution:
            return Solution(pattern.mask_from_scores(weight_OI), weight_OI * 1e6)

    with pytest.raises(NumericalError, match="layer"):
        solve_layer(Blow(), torch.ones(2, 8), None, LayerForm(NMPattern(2, 4)), torch.float16, "layer")


def test_an_ignore_pattern_that_matches_nothing(tmp_path: Path) -> None:
    model = models.build("llama")
    with pytest.raises(RecipeError, match="matches no linear layer"):
        run(model, recipe("wanda", "ignore=['nothing']"), tmp_path / "c")
    assert not list(tmp_path.iterdir()), "a mistake left a work directory behind, which then belongs to another run"


def test_a_layer_that_never_runs_is_named(tmp_path: Path) -> None:
    model = models.build("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.gate_proj: no calibration input ever reached"):
        run(model, recipe("wanda"), tmp_path / "work")
