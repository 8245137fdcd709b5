"""Sparse weights and a low-rank correction from one sweep: what is stored, what follows it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import RecipeError
from maskgen.core.packed import StoredLayer
from maskgen.recipes.recipe import Recipe
from maskgen.sweep.workdir import WorkDir
from tests import models
from tests.maskgen.sweeping import BASE, recipe, run

RANK = ("method.rank=4", "method.rounds=2")
INT4 = ("values.kind=int4", "values.group=64")


def layers_of(work: WorkDir, wanted: Recipe) -> dict[str, StoredLayer]:
    return {name: work.layer(name) for name in work.mask_set(BASE, wanted.digest()).names}


@pytest.mark.parametrize("values", [(), INT4])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_every_layer_has_a_correction_that_what_follows_is_calibrated_with(
    values: tuple[str, ...], asymmetric: bool, tmp_path: Path
) -> None:
    wanted = recipe("admm-lowrank", *RANK, *values, f"method.asymmetric={str(asymmetric).lower()}")
    model = models.build("llama", dtype=torch.bfloat16)
    _, work = run(model, wanted, tmp_path / "work")
    stored, modules = layers_of(work, wanted), dict(model.named_modules())
    assert work.form.correction == LowRankCorrection(4)
    for name, layer in stored.items():
        layer.verify(name)
        assert layer.packed.kind == ("int4" if values else "float")
        correction, weight_OI = layer.correction, modules[name].weight
        assert correction is not None and correction.pool is not None
        assert correction.out.dtype == correction.pool.dtype == torch.bfloat16
        assert correction.out.shape == (weight_OI.shape[0], 4) and correction.pool.shape == (4, weight_OI.shape[1])
        assert torch.equal(weight_OI, layer.dense(weight_OI.dtype))


@torch.no_grad()
def test_the_outputs_come_nearer_than_without(tmp_path: Path) -> None:
    errors = []
    for name, rank in (("admm", ()), ("admm-lowrank", RANK)):
        model, dense = models.build("llama"), models.build("llama")
        run(model, recipe(name, *rank), tmp_path / name)
        tokens = torch.arange(48)[None] % models.VOCABULARY
        errors.append(float((model(tokens).logits - dense(tokens).logits).norm()))
    assert errors[1] < 0.95 * errors[0]


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    wanted = recipe("admm-lowrank", *RANK)
    _, whole = run(models.build("llama"), wanted, tmp_path / "work")
    name = whole.mask_set(BASE, wanted.digest()).names[-1]
    before = whole.layer(name)
    (tmp_path / "work" / f"block-{models.LAYERS - 1:05d}.safetensors").unlink()
    report, again = run(models.build("llama"), wanted, tmp_path / "work")
    after = again.layer(name)
    assert report.resumed_blocks == models.LAYERS - 1
    assert before.correction is not None and after.correction is not None
    assert before.correction.pool is not None and after.correction.pool is not None
    assert torch.equal(after.packed.values, before.packed.values)
    assert torch.equal(after.correction.out, before.correction.out)
    assert torch.equal(after.correction.pool, before.correction.pool)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("best-effort", ("prior.rank=4",), r"\[prior\]: makes a correction .* drops; set method\.rank=4, or leave"),
        ("best-effort-lowrank", ("method.rank=8",), r"\[prior\]: makes a correction .* set method\.rank=20"),
        ("best-effort-lowrank", ("method.weights=dense", "method.mask=prior"), r"\[prior\]: makes a correction"),
        ("reconstruct", ("prior.name=admm", "prior.rank=4"), r"\[prior\]: makes a correction that reconstruct"),
        ("admm-lowrank", ("method.rank=-3",), r"method\.rank -3: expected a number from 0"),
        ("sparsegpt", ("method.rank=4",), r"method\.rank: sparsegpt has no such option"),
    ],
)
def test_recipes_that_are_refused(name: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(name, *overrides)
