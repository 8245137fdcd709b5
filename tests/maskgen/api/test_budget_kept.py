"""What is made of the result of a budget: trained, from a recipe or a checkpoint, or corrected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.export.allocation import read_allocation
from tests.maskgen.budgets import LOW_RANK, request, spend, stored_share

ModelDir = Callable[..., Path]
LOW_RANK_PRIOR = {key.replace("method", "prior"): value for key, value in LOW_RANK.items()}
TRAINING: dict[str, Any] = {
    "train.steps": 3, "train.batch": 2, "train.window_tokens": 16, "train.heldout_windows": 4, "train.dtype": "float32",
}  # fmt: skip


def stop_at_step_2(event: Any) -> None:
    if isinstance(event, maskgen.TrainingStep) and event.step == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("best-effort", {}),
        ("maskllm", {}),
        ("best-effort", {"method.rank": 3}),
        ("best-effort-lowrank", {**LOW_RANK_PRIOR, "method.rank": 3}),
    ],
)
def test_what_is_learned_starts_with_the_budget_spent(
    recipe: str, overrides: dict[str, Any], model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense, out, overrides = model_dir(), tmp_path / "out", {**TRAINING, **overrides}
    with pytest.raises(KeyboardInterrupt):
        maskgen.run(request(dense, text_file, out, recipe, overrides=overrides, bytes=0.7), stop_at_step_2)
    made = maskgen.run(request(dense, text_file, out, recipe, overrides=overrides, bytes=0.7))
    assert isinstance(made, maskgen.LearnResult) and made.allocation is not None
    config = SparseCheckpoint.open(out).config
    assert made.allocation.dense and made.allocation == read_allocation(out)
    assert stored_share(out) == pytest.approx(made.allocation.bytes) and made.allocation.bytes <= 0.7
    assert made.allocation.dense <= set(config.ignored) and not made.allocation.dense & set(config.targets)
    assert {one.reason for one in made.plan.kept} == {"the budget keeps it dense, where sparsity costs most"}
    kept, base = maskgen.load(out), maskgen.load(dense)
    for name in made.allocation.dense:
        is_untouched = torch.equal(kept.get_parameter(f"{name}.weight"), base.get_parameter(f"{name}.weight"))
        assert is_untouched == (recipe == "maskllm"), "the others train whole decoder blocks"


@pytest.mark.parametrize(
    ("start", "recipe"),
    [
        ("magnitude", "best-effort"),
        ("magnitude", "reconstruct"),
        ("magnitude", "maskllm"),
        ("admm-lowrank", "best-effort-lowrank"),
    ],
)
def test_a_result_made_under_a_budget_takes_it_along(
    start: str, recipe: str, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    low_rank = LOW_RANK if "lowrank" in start else {}
    first = spend(model_dir(), text_file, tmp_path / "first", start, bytes=0.7, overrides=low_rank)
    overrides = TRAINING if recipe != "reconstruct" else {"method.epochs": 1}
    if low_rank:
        overrides = {**overrides, **LOW_RANK_PRIOR, "method.rank": 3}
    made = maskgen.run(
        request(model_dir(), text_file, tmp_path / "out", recipe, overrides=overrides, prior=tmp_path / "first")
    )
    assert isinstance(made, maskgen.LearnResult | maskgen.PruneResult)
    assert made.allocation == first == read_allocation(made.out)
    assert not first.dense & set(SparseCheckpoint.open(made.out).config.targets)


@pytest.mark.parametrize("recipe", ["best-effort", "reconstruct", "eora"])
def test_a_result_counts_its_own_values(recipe: str, model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    """Training makes floats of the codes that it starts from; what is corrected keeps them."""
    overrides = {"best-effort": TRAINING, "reconstruct": {"method.epochs": 1}, "eora": {"method.rank": 3}}[recipe]
    codes = {"values.kind": "int8"}
    first = spend(model_dir(), text_file, tmp_path / "first", "magnitude", bytes=0.6, overrides=codes)
    out = tmp_path / "out"
    maskgen.run(request(model_dir(), text_file, out, recipe, overrides=overrides, prior=tmp_path / "first"))
    after = read_allocation(out)
    assert SparseCheckpoint.open(out).config.values == ("int8" if recipe == "eora" else "float")
    assert after is not None and after.dense == first.dense and after.bytes > first.bytes
    assert after.bytes == pytest.approx(stored_share(out))


@pytest.mark.parametrize(("recipe", "more"), [("best-effort", TRAINING), ("eora", {})])
def test_a_correction_that_is_added_to_it_counts(
    recipe: str, more: dict[str, Any], model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    first = spend(model_dir(), text_file, tmp_path / "first", "magnitude", bytes=0.7)
    overrides, out = {"method.rank": 3, **more}, tmp_path / "out"
    maskgen.run(request(model_dir(), text_file, out, recipe, overrides=overrides, prior=tmp_path / "first"))
    after = read_allocation(out)
    assert after is not None and after.dense == first.dense
    assert after.bytes == pytest.approx(stored_share(out)) and after.bytes > first.bytes
