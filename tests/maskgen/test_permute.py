"""Reordered neurons: the same function, more of the scores kept, and refusals that leave nothing behind.

Legend: B = batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from maskgen import model as loader
from maskgen import permute
from maskgen.compress import iterate_tensors
from maskgen.core.checkpoint import SparseCheckpoint, read_headers
from maskgen.core.digest import digest_weights
from maskgen.core.errors import ModelError, NumericalError
from maskgen.inspect import inspect
from maskgen.recipe import load
from tests import models
from tests.maskgen.test_cli import SMALL, run

ModelDir = Callable[..., Path]
BIASED = {"mlp_bias": True, "attention_bias": True}
SETTINGS = ["calibration.window_tokens=32", "calibration.samples=6"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """`[B, T, V]` of fixed tokens."""
    ids_BT = torch.randint(models.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    result: Tensor = model(input_ids=ids_BT).logits
    return result


def windows() -> Tensor:
    return torch.randint(models.VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(5))


def stored(directory: Path) -> dict[str, Tensor]:
    return dict(iterate_tensors(read_headers(directory)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("llama", BIASED), ("llama_tied", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {})],
)
def test_the_same_function(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    dense = models.save(kind, tmp_path / "dense", **changes)
    recipe, out = load("ria", SETTINGS), tmp_path / "out"
    report = permute.permute(dense, loader.load(dense), recipe, windows(), out, {"base_digest": "x"})
    before, after = stored(dense), stored(out)
    assert before.keys() == after.keys() and len(report.arrangements) == models.LAYERS
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    ffn = {name for name in before if ".mlp." in name}
    assert moved == {name for name in ffn if not name.endswith("down_proj.bias")}
    assert report.kept[1] > report.kept[0] + 0.01
    reordered = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(reordered), logits(loader.load(dense, torch.float32)), rtol=1e-4, atol=1e-4)


def test_masks_keep_what_the_report_says(model_dir: ModelDir, tmp_path: Path) -> None:
    """Scores of a method without data, so that they can be had again from what was written."""
    dense, out = model_dir(), tmp_path / "out"
    recipe = load("magnitude", [])
    report = permute.permute(dense, loader.load(dense), recipe, None, out, {})
    for name, found in report.arrangements.items():
        size_OI = stored(out)[f"{name}.weight"].abs().float()
        kept = float(size_OI[recipe.pattern.mask_from_scores(size_OI)].sum() / size_OI.sum())
        assert found.after == pytest.approx(kept, rel=1e-5) and found.after > found.before


def test_the_command_and_a_recipe_after_it(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out, sparse = model_dir(), tmp_path / "out", tmp_path / "sparse"
    code, said, errors = run(capsys, "permute", "ria", "--model", dense, "--data", text_file, "--out", out, *SMALL)
    assert (code, errors) == (0, "") and f"neurons of {models.LAYERS} layers" in said and "2:4 keeps" in said
    provenance = json.loads((out / permute.PROVENANCE_FILE).read_text())
    assert provenance["base_digest"] == digest_weights(dense) and provenance["data_digest"].startswith("sha256:")
    assert provenance["recipe"]["method"]["name"] == "ria" and len(provenance["kept"]) == models.LAYERS
    code, _, errors = run(capsys, "run", "sparsegpt", "--model", out, "--data", text_file, "--out", sparse, *SMALL)
    assert (code, errors) == (0, "")
    assert SparseCheckpoint.open(sparse).config.base_digest == digest_weights(out)
    assert all(layer.follows for layer in inspect(sparse).packed_layers)


def test_what_is_ignored_stays(model_dir: ModelDir, tmp_path: Path) -> None:
    dense = model_dir()
    recipe = load("magnitude", ["ignore=['*.layers.0.mlp.down_proj']"])
    report = permute.permute(dense, loader.load(dense), recipe, None, tmp_path / "out", {})
    assert sorted(report.arrangements) == [f"model.layers.{i}.mlp.down_proj" for i in range(1, models.LAYERS)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored(dense)[name], stored(tmp_path / "out")[name])


def test_an_ffn_that_is_another_function_is_found_out(model_dir: ModelDir, tmp_path: Path) -> None:
    dense = model_dir()
    model = loader.load(dense)
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr, index]
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).cumsum(-1) * mlp.up_proj(x))
    with pytest.raises(ModelError, match=r"model\.layers\.1: .* differ by"):
        permute.permute(dense, model, load("ria", SETTINGS), windows(), tmp_path / "out", {})
    assert not any(path.name.endswith(("out", ".partial")) for path in tmp_path.iterdir())


def test_a_layer_that_no_input_reaches(model_dir: ModelDir, tmp_path: Path) -> None:
    dense = model_dir()
    model = loader.load(dense)
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr, index]
    mlp.forward = lambda x: x
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj: no calibration input"):
        permute.permute(dense, model, load("ria", SETTINGS), windows(), tmp_path / "out", {})


@pytest.mark.parametrize("kind", ["opt", "gpt_neox"])
def test_other_ffns_are_refused(kind: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = models.save(kind, tmp_path / "dense"), tmp_path / "out"
    code, _, errors = run(capsys, "permute", "ria", "--model", dense, "--data", text_file, "--out", out, *SMALL)
    assert code == 2 and "no block has a down_proj to prune" in errors and len(errors.splitlines()) == 1
    assert not out.exists()


def test_mistakes_are_one_line(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse_dir, out = model_dir(), tmp_path / "sparse", tmp_path / "out"
    models.save_sparse(dense, sparse_dir)
    for argv, message in (
        (["sparsegpt", "--model", dense, "--data", text_file, "--out", out], "no scores that are independent"),
        (["maskllm", "--model", dense, "--data", text_file, "--out", out], "no scores that are independent"),
        (["ria", "--model", sparse_dir, "--data", text_file, "--out", out], "already sparse"),
        (["ria", "--model", dense, "--out", out], "needs calibration text"),
        (["ria", "--model", dense, "--data", text_file, "--out", tmp_path], "exists"),
        (["nothing", "--model", dense, "--out", out], "nothing"),
    ):
        code, _, errors = run(capsys, "permute", *argv)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1, (argv, errors)
    assert not out.exists()
