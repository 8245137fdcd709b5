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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from maskgen.core.checkpoint import SparseCheckpoint, iterate_tensors, read_headers
from maskgen.core.digest import digest_weights
from maskgen.core.errors import ModelError, NumericalError
from maskgen.core.pattern import NMPattern
from maskgen.export.inspect import inspect
from maskgen.hf import model as loader
from maskgen.hf.planning import plan
from maskgen.recipes.recipe import load
from maskgen.sweep import permute
from tests import models
from tests.maskgen.cli.test_parser import SMALL, run

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


def reorder(dense: Path, out: Path, settings: list[str], name: str = "ria") -> permute.PermuteReport:
    recipe = load(name, settings)
    model = loader.load(dense)
    todo = plan(model, recipe.pattern, recipe.ignore)
    found = permute.find(model, todo, recipe, windows() if name == "ria" else None)
    return permute.write(dense, found, out, {"base_digest": "x"}, shard_bytes=60_000)


def stored(directory: Path) -> dict[str, Tensor]:
    return dict(iterate_tensors(read_headers(directory)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("llama", BIASED), ("llama_tied", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {})],
)
def test_the_same_function(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    dense = models.save(kind, tmp_path / "dense", **changes)
    out = tmp_path / "out"
    report = reorder(dense, out, SETTINGS)
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
    report, recipe = reorder(dense, out, [], "magnitude"), load("magnitude")
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
    provenance = json.loads((out / permute.PERMUTATION_FILE).read_text())
    assert provenance["base_digest"] == digest_weights(dense) and provenance["data_digest"].startswith("sha256:")
    assert provenance["recipe"]["method"]["name"] == "ria" and len(provenance["layers"]) == models.LAYERS
    code, _, errors = run(capsys, "run", "sparsegpt", "--model", out, "--data", text_file, "--out", sparse, *SMALL)
    assert (code, errors) == (0, "")
    assert SparseCheckpoint.open(sparse).config.base_digest == digest_weights(out)
    assert all(layer.follows for layer in inspect(sparse).packed_layers)


def test_what_is_ignored_stays(model_dir: ModelDir, tmp_path: Path) -> None:
    dense = model_dir()
    report = reorder(dense, tmp_path / "out", ["ignore=['*.layers.0.mlp.down_proj']"], "magnitude")
    assert sorted(report.arrangements) == [f"model.layers.{i}.mlp.down_proj" for i in range(1, models.LAYERS)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored(dense)[name], stored(tmp_path / "out")[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_change_places_and_nothing_else(dtype: torch.dtype, tmp_path: Path) -> None:
    dense, out = models.save("llama_tied", tmp_path / "dense", "60KB", dtype=dtype), tmp_path / "out"
    assert len(list(dense.glob("*.safetensors"))) > 1
    report = reorder(dense, out, SETTINGS)
    before, after = stored(dense), stored(out)
    for name, found in report.arrangements.items():
        assert not found.order.equal(torch.arange(len(found.order)))
        up = name.replace("down_proj", "up_proj.weight")
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"][:, found.order])
        assert torch.equal(after[up], before[up][found.order]) and after[up].dtype == dtype
    layers = json.loads((out / permute.PERMUTATION_FILE).read_text())["layers"]
    assert {name: found.order.tolist() for name, found in report.arrangements.items()} == {
        name: layer["order"] for name, layer in layers.items()
    }


@pytest.mark.parametrize("huge", [1.0, 1e4], ids=["", "beside a huge token"])
@pytest.mark.parametrize("strength", [10.0, 0.05])
def test_an_ffn_that_is_another_function_is_found_out(model_dir: ModelDir, strength: float, huge: float) -> None:
    model = loader.load(model_dir(), torch.float32)
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr, index]
    place_I = torch.linspace(0, strength, mlp.down_proj.in_features)
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * (1 + place_I))
    model.get_input_embeddings().weight[0] *= huge  # type: ignore[operator]
    windows_ST = windows()
    windows_ST[0, 0] = 0
    with pytest.raises(ModelError, match=r"model\.layers\.1: .* differs by"):
        permute.find(model, plan(model, NMPattern(2, 4)), load("ria", SETTINGS), windows_ST)


def test_a_layer_that_no_input_reaches(model_dir: ModelDir) -> None:
    model = loader.load(model_dir())
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr, index]
    mlp.forward = lambda x: x
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj: no calibration input"):
        permute.find(model, plan(model, NMPattern(2, 4)), load("ria", SETTINGS), windows())


def test_checked_on_what_a_short_model_reads(tmp_path: Path) -> None:
    dense = models.save("llama", tmp_path / "dense", max_position_embeddings=8)
    assert reorder(dense, tmp_path / "out", [], "magnitude").kept[1] > 0


def test_tensors_of_another_kind_are_copied() -> None:
    order = torch.tensor([3, 1, 2, 0])
    for name in ("x.gate_proj.scale", "x.up_proj.lora_A", "x.down_proj.bias", "x.norm.weight", "y.up_proj.weight"):
        tensor = torch.arange(8.0).view(4, 2)
        assert permute.reordered(name, tensor, {"x.down_proj": order}) is tensor


def test_a_directory_that_will_be_refused_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = models.save("llama", tmp_path / "dense"), tmp_path / "out"
    file = dense / "model.safetensors"
    save_file(load_file(file) | {"model.x.bitmask": torch.zeros(1)}, file, metadata={"format": "pt"})
    monkeypatch.setattr(permute, "find", lambda *_: pytest.fail("went to work"))
    code, _, errors = run(capsys, "permute", "magnitude", "--model", dense, "--out", out)
    assert code == 2 and "reserved" in errors.splitlines()[-1] and not out.exists()


@pytest.mark.parametrize("kind", ["opt", "gpt_neox"])
def test_other_ffns_are_refused(kind: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = models.save(kind, tmp_path / "dense"), tmp_path / "out"
    code, _, errors = run(capsys, "permute", "ria", "--model", dense, "--data", text_file, "--out", out, *SMALL)
    assert code == 2 and "no block has a down_proj that this recipe prunes" in errors and len(errors.splitlines()) == 1
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
