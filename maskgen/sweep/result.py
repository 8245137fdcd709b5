"""What a sweep has made of a dense model, as a sparse checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskgen.core.config import SparseConfig
from maskgen.core.mask import MaskSet
from maskgen.export import compress
from maskgen.export.compress import CompressReport
from maskgen.hf.planning import Plan
from maskgen.recipes.recipe import RECIPE_FILE, Recipe
from maskgen.sweep.workdir import WorkDir


def write(
    work: WorkDir,
    recipe: Recipe,
    model_dir: Path,
    label: str,
    base_digest: str,
    plan: Plan,
    out_dir: Path,
    extra: Mapping[str, Any],
) -> tuple[MaskSet, CompressReport]:
    """Write `out_dir`, whole or not at all, with the recipe and the `extra` JSON files beside the weights.

    `work` holds the layers that `recipe` made of the dense model in `model_dir`, which is named `label` and whose
    weights have `base_digest`; `plan` says which ones stayed dense. Returns the masks, too. Raises what
    `export.compress.compress` does.
    """
    masks = work.mask_set(base_digest, recipe.digest())
    config = SparseConfig(
        pattern=recipe.pattern,
        targets=masks.names,
        ignored=plan.listed,
        mask_digest=masks.digest(),
        recipe_digest=recipe.digest(),
        base_model=label,
        base_digest=base_digest,
        values=work.form.values,
        correction=work.form.correction,
        group=work.form.group,
    )
    files = {RECIPE_FILE: recipe.resolved(), **extra}
    return masks, compress.compress(model_dir, config, lambda name, _: work.layer(name), out_dir, files)
