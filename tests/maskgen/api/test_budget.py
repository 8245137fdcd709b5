"""Budgets from a request to a checkpoint: met, spent well, the same after a kill, used again, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskgen
from maskgen.api import pruning
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.companions import ALLOCATION_FILE
from maskgen.core.errors import DataError, FormatError, RecipeError
from maskgen.export.allocation import read_allocation
from maskgen.recipes import recipe as recipe_module
from maskgen.recipes.recipe import RECIPE_FILE
from tests import models
from tests.maskgen.budgets import LOW_RANK, request, spend, stored_share

ModelDir = Callable[..., Path]


def own_text(dense: Path, path: Path) -> Path:
    """Token ids that a random model itself draws: of other text, sparsity may well lower its perplexity."""
    torch.manual_seed(0)
    ids = maskgen.load(dense).generate(
        torch.arange(200)[:, None], do_sample=True, top_k=0, min_new_tokens=127, max_length=128
    )
    np.save(path, ids.flatten().numpy())
    return path


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("recipe", ["sparsegpt", "magnitude", "reconstruct", "admm-lowrank"])
def test_a_budget_of_bytes_is_met_where_it_hurts_least(
    recipe: str, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense, out = model_dir("llama", dtype=torch.bfloat16), tmp_path / "out"
    allocation = spend(dense, text_file, out, recipe, bytes=0.7, overrides=LOW_RANK if "lowrank" in recipe else {})
    checkpoint, report = SparseCheckpoint.open(out), maskgen.inspect(maskgen.InspectRequest(model=out))
    blocks = [layer for layer in report.layers if ".layers." in layer.name]
    assert stored_share(out) == pytest.approx(allocation.bytes) and 0.65 < allocation.bytes <= 0.7
    assert allocation.dense == {layer.name for layer in blocks if layer.stored == "dense"} and allocation.dense
    assert allocation.dense <= set(checkpoint.config.ignored) and not allocation.dense & set(checkpoint.config.targets)
    assert 0 < allocation.kl < allocation.strict_kl
    assert sum(layer.cost for layer in allocation.layers) == pytest.approx(allocation.strict_kl, rel=0.1)
    worst = max(allocation.layers, key=lambda layer: layer.cost / layer.dense_bytes)
    assert worst.dense, "what costs most for its bytes"
    assert report.allocation == allocation == read_allocation(out)
    assert {one.reason for one in report.kept} == {"the budget keeps it dense, where sparsity costs most"}
    made_with = json.loads((out / RECIPE_FILE).read_text())
    assert made_with["budget"] == {"bytes": 0.7, "speedup": None, "max_ppl_increase": None, "windows": 4}
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(("values", "least"), [("int8", 0.3125), ("int4", 0.203125)])
def test_a_budget_counts_values_as_they_are_stored(
    values: str, least: float, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense, out = model_dir("llama", dtype=torch.bfloat16), tmp_path / "out"
    allocation = spend(dense, text_file, out, "admm", bytes=0.6, overrides={"values.kind": values})
    assert SparseCheckpoint.open(out).config.values == values
    assert stored_share(out) == pytest.approx(allocation.bytes) and 0.5 < allocation.bytes <= 0.6
    assert allocation.dense, "with sixteen bits even all layers sparse would take 0.5625"
    assert all(layer.sparse_bytes > least * layer.dense_bytes for layer in allocation.layers)
    assert all(layer.sparse_bytes < (least + 0.1) * layer.dense_bytes for layer in allocation.layers)
    assert read_allocation(out) == allocation


def test_what_a_layer_costs_is_measured_with_its_correction(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    """Its sparse weights alone, which were chosen to go with one, would cost more than those without."""
    costs = []
    for rank in (8, 0):
        overrides = {**LOW_RANK, "method.rank": rank}
        costs.append(
            spend(model_dir(), text_file, tmp_path / str(rank), "admm-lowrank", bytes=0.9, overrides=overrides)
        )
    corrected, plain = costs
    assert corrected.strict_kl < 0.95 * plain.strict_kl
    assert sum(layer.cost for layer in corrected.layers) == pytest.approx(corrected.strict_kl, rel=0.1)


def test_a_killed_run_ends_the_same_and_its_costs_serve_the_next_budget(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense = model_dir()
    spend(dense, text_file, tmp_path / "whole", bytes=0.8)
    seen: list[str] = []

    def stop_at(what: str) -> Callable[[Any], None]:
        def heard(event: Any) -> None:
            if isinstance(event, maskgen.SweepProgress):
                seen.append(event.what)
                if event.what == what:
                    raise KeyboardInterrupt

        return heard

    out = tmp_path / "out"
    for what in ("block done", "costs of layers, pass 2 of 3"):
        with pytest.raises(KeyboardInterrupt):
            spend(dense, text_file, out, bytes=0.8, heard=stop_at(what))
        assert not out.exists()
    spend(dense, text_file, out, bytes=0.8, keep_work=True, heard=stop_at("costs of layers, pass 1 of 3"))
    assert files(out) == files(tmp_path / "whole")
    out.rename(tmp_path / "first")
    smaller = spend(dense, text_file, out, bytes=0.7, heard=stop_at("costs of layers, pass 3 of 3"))
    assert smaller.bytes <= 0.7 and not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("recipe", ["magnitude", "admm-lowrank"])
def test_the_record_goes_along_only_where_it_is_true(
    recipe: str, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense, out = model_dir("llama", dtype=torch.bfloat16), tmp_path / "out"
    spent = spend(dense, text_file, out, recipe, bytes=0.7, overrides=LOW_RANK if "lowrank" in recipe else {})
    maskgen.quantise(maskgen.QuantiseRequest(model=out, out=tmp_path / "int8", values="int8"))
    small = read_allocation(tmp_path / "int8")
    assert small is not None and small.dense == spent.dense
    assert small.bytes == pytest.approx(stored_share(tmp_path / "int8")) and small.bytes < spent.bytes
    maskgen.decompress(maskgen.DecompressRequest(model=out, out=tmp_path / "masked"))
    assert read_allocation(tmp_path / "masked") is None


def test_a_budget_in_the_recipe_is_replaced_by_what_is_asked_for(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[method]\nname = "magnitude"\n[budget]\nbytes = 0.9\nwindows = 2\n')
    in_recipe = spend(model_dir(), text_file, tmp_path / "a", str(mine))
    asked = spend(model_dir(), text_file, tmp_path / "b", str(mine), bytes=0.75)
    assert (in_recipe.asked, in_recipe.windows, asked.asked, asked.windows) == ({"bytes": 0.9}, 2, {"bytes": 0.75}, 2)
    assert in_recipe.strict_kl == asked.strict_kl and in_recipe.dense > asked.dense


@pytest.mark.parametrize(("recipe", "overrides"), [("magnitude", {}), ("admm-lowrank", LOW_RANK)])
def test_a_budget_of_perplexity_is_searched_for_and_proven_on_other_windows(
    recipe: str, overrides: dict[str, Any], model_dir: ModelDir, tmp_path: Path
) -> None:
    dense, out = model_dir(), tmp_path / "out"
    text_file = own_text(dense, tmp_path / "own.npy")
    strict = maskgen.run(request(dense, text_file, tmp_path / "strict", recipe, overrides=overrides))
    assert isinstance(strict, maskgen.PruneResult) and not isinstance(strict.quality, str)
    most = 0.4 * strict.quality.increase
    found = spend(dense, text_file, out, recipe, max_ppl_increase=most, overrides=overrides)
    assert found.asked == {"max_ppl_increase": most} and found.proof is not None and found.proof.increase <= most
    assert found.proof.increase == pytest.approx(found.proof.perplexity / found.proof.dense_perplexity - 1)
    assert found.bytes in {look.bytes for look in found.search if look.increase <= most} and 0.5313 < found.bytes < 1
    assert found.bytes == pytest.approx(stored_share(out))
    quality = maskgen.inspect(maskgen.InspectRequest(model=out)).quality
    assert quality is not None and quality.perplexity == found.proof.perplexity
    assert quality.windows == found.proof.windows <= found.search_windows <= quality.windows + 1


def test_a_proof_that_fails_searches_for_less_and_at_last_gives_up(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = pruning.measure_pruned, []

    def worse(*args: Any) -> Any:
        found = measure(*args)
        calls.append(found)
        return replace(found, perplexity=found.dense_perplexity * 1.2) if len(calls) < failing else found

    monkeypatch.setattr(pruning, "measure_pruned", worse)
    failing = 2
    found = spend(model_dir(), text_file, tmp_path / "a", "magnitude", max_ppl_increase=0.1)
    assert found.proof is not None and found.proof.attempt == 2 and len(calls) == 2
    calls.clear()
    failing = 9
    with pytest.raises(RecipeError, match=r"not proven in 4 attempts; the nearest that can be met is 0.2000, at 0\."):
        spend(model_dir(), text_file, tmp_path / "b", "magnitude", max_ppl_increase=0.1)
    assert len(calls) == 4 and not (tmp_path / "b").exists()


def test_a_recipe_without_a_budget_is_what_it_was() -> None:
    plain = recipe_module.load("sparsegpt")
    assert "budget" not in plain.resolved()
    assert recipe_module.load("sparsegpt", budget={"bytes": 0.75}).strict().digest() == plain.digest()


@pytest.mark.parametrize(
    ("recipe", "changes", "error", "message"),
    [
        (
            "sparsegpt",
            {"bytes": 0.4},
            RecipeError,
            "0.4: .* the nearest budget that can be met is 0.5313",
        ),
        ("sparsegpt", {"overrides": {"budget.bytes": 1.5}}, RecipeError, "budget.bytes: input should be less than 1"),
        ("sparsegpt", {"overrides": {"budget.windows": 3}}, RecipeError, r"\[budget\]: found nothing, expected"),
        ("magnitude", {"bytes": 0.7, "data": ()}, DataError, "a budget is measured on text; give it with `data`"),
        (
            "sparsegpt",
            {"bytes": 0.7, "max_ppl_increase": 0.1},
            RecipeError,
            "found bytes and max_ppl_increase",
        ),
        (
            "best-effort",
            {"max_ppl_increase": 0.1},
            RecipeError,
            r"max_ppl_increase: adaptive_sparse spends budgets of bytes only",
        ),
        ("proxsparse", {"bytes": 0.7}, RecipeError, r"proxsparse with these options has no \[prior\] to measure"),
        ("best-effort", {"bytes": 0.7, "prior": "sparse"}, RecipeError, r"the recipe's own \[prior\] prunes"),
        ("reconstruct", {"bytes": 0.7, "prior": "sparse"}, RecipeError, r"the recipe's own \[prior\] prunes"),
        (
            "admm-lowrank",
            {"bytes": 0.6, "overrides": LOW_RANK},
            RecipeError,
            r"0\.6: .* take (0\.6\d+) of their dense bytes, 0\.\d+ of them for corrections \(rank\); .* met is \1",
        ),
        (
            "admm-lowrank",
            {"max_ppl_increase": 0.1, "overrides": {"method.rank": 31}},
            RecipeError,
            r"q_proj\+k_proj\+v_proj takes \d+ bytes sparse, \d+ of them for corrections, and \d+ dense, .* lower rank",
        ),
        ("admm-lowrank", {"speedup": 1.1, "kernel_table": "times"}, RecipeError, "kernel tables have no times"),
    ],
)
def test_a_budget_that_cannot_be_had_is_refused_before_anything_is_made(
    recipe: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
) -> None:
    if "prior" in changes:
        models.save_sparse(model_dir(), tmp_path / "sparse")
        changes = {**changes, "prior": tmp_path / "sparse"}
    with pytest.raises(error, match=message):
        maskgen.run(request(model_dir(), text_file, tmp_path / "out", recipe, **changes))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("change", [{"bytes": 2.0}, {"extra": 1}, {"layers": []}, {"strict_kl": "much"}])
def test_a_record_from_anywhere_is_read_strictly(change: dict[str, Any], tmp_path: Path) -> None:
    layer = {"layers": ["a"], "dense": True, "cost": 0.1, "dense_bytes": 4, "sparse_bytes": 2}
    record = {"format_version": 1, "asked": {"bytes": 0.9}, "bytes": 0.9, "strict_kl": 1.0, "kl": 0.5, "windows": 1}
    record |= {"window_tokens": 8, "layers": [layer]}
    (tmp_path / ALLOCATION_FILE).write_text(json.dumps(record))
    found = read_allocation(tmp_path)
    assert found is not None and found.dense == {"a"}
    (tmp_path / ALLOCATION_FILE).write_text(json.dumps({**record, **change}))
    with pytest.raises(FormatError, match=f"{ALLOCATION_FILE}: .*; delete it"):
        read_allocation(tmp_path)
