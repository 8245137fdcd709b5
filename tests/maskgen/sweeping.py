"""What the tests of the sweep share: small recipes, random tokens, one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgen.hf.planning import plan
from maskgen.recipes import recipe as recipe_module
from maskgen.recipes.recipe import Recipe
from maskgen.sweep.driver import sweep
from maskgen.sweep.report import SweepReport
from maskgen.sweep.workdir import WorkDir
from tests import models

BASE = "sha256:" + "b" * 64
SETTINGS = ("calibration.samples=10", "calibration.window_tokens=24", "calibration.batch=4")


def recipe(name: str, *overrides: str) -> Recipe:
    return recipe_module.load(name, [*SETTINGS, *overrides])


def windows(samples: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(models.VOCABULARY, (samples, 24), generator=torch.Generator().manual_seed(seed))


def run(
    model: nn.Module, wanted: Recipe, work: Path, data: Tensor | None = None, **options: Any
) -> tuple[SweepReport, WorkDir]:
    todo = plan(model, wanted.pattern, wanted.ignore)
    return sweep(model, todo, wanted, windows() if data is None else data, work, BASE, **options)
