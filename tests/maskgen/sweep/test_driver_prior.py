"""A sweep that starts from given masks: they are used, they identify the run, and wrong ones are refused beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgen.core.errors import DataError, OutputExistsError
from maskgen.core.pattern import NMPattern
from tests import models
from tests.maskgen.sweeping import recipe, run

REPAIR = recipe("admm", "method.mask=prior")


def random_masks(pattern: str = "2:4", skip: str = "", cut: str = "") -> Callable[[str], Tensor]:
    model = models.build("llama")

    def mask(name: str) -> Tensor:
        if name == skip:
            raise KeyError(name)
        weight_OI = model.get_submodule(name).weight
        assert isinstance(weight_OI, Tensor)
        score_OI = torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(len(name)))
        mask_OI = NMPattern.parse(pattern).mask_from_scores(score_OI)
        return mask_OI[:-1] if name == cut else mask_OI

    return mask


def test_the_masks_are_kept_and_the_weights_repaired(tmp_path: Path) -> None:
    masks = random_masks()
    model, dense = models.build("llama"), models.build("llama")
    report, work = run(model, REPAIR, tmp_path / "work", prior=masks, prior_digest="sha256:1")
    assert report.targets
    for name in report.targets:
        mask_OI = work.packed(name).mask()
        assert torch.equal(mask_OI, masks(name)), name
        before, after = dense.get_submodule(name).weight, model.get_submodule(name).weight
        assert isinstance(before, Tensor) and isinstance(after, Tensor)
        assert not torch.equal(after[mask_OI], before[mask_OI]), name


def test_the_prior_identifies_the_run(tmp_path: Path) -> None:
    run(models.build("llama"), REPAIR, tmp_path / "work", prior=random_masks(), prior_digest="sha256:1")
    report, _ = run(models.build("llama"), REPAIR, tmp_path / "work", prior=random_masks(), prior_digest="sha256:1")
    assert report.resumed_blocks == models.LAYERS
    with pytest.raises(OutputExistsError, match="another run"):
        run(models.build("llama"), REPAIR, tmp_path / "work", prior=random_masks(), prior_digest="sha256:2")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (random_masks(skip="model.layers.2.mlp.up_proj"), r"no mask for model\.layers\.2\.mlp\.up_proj"),
        (random_masks(cut="model.layers.2.mlp.up_proj"), r"up_proj: shape \(95, 64\), the layer has \(96, 64\)"),
        (random_masks("1:4"), r"prior mask of model\.layers\.0\.\S+: row 0, .* keep 1 weights, expected 2"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_work_begins(
    masks: Callable[[str], Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        run(models.build("llama"), REPAIR, tmp_path / "work", prior=masks, prior_digest="sha256:1")
    assert not list(tmp_path.iterdir())
