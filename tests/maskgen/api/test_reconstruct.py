"""`reconstruct` from a request to a checkpoint: the files, the start from another result, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import PooledCorrection
from maskgen.core.errors import DataError, FormatError, OutputExistsError, RecipeError
from maskgen.core.quality import Quality
from maskgen.recipes.recipe import RECIPE_FILE
from maskgen.sweep.reconstruct import RECONSTRUCTION_FILE
from tests import models

ModelDir = Callable[..., Path]
SHORT: dict[str, Any] = {"calibration.window_tokens": 32, "calibration.samples": 6, "method.epochs": 2}


def request(dense: Path, text: Path, out: Path, **changes: Any) -> maskgen.LearnRequest:
    overrides = {**SHORT, **changes.pop("overrides", {})}
    return maskgen.LearnRequest(recipe="reconstruct", model=dense, data=text, out=out, overrides=overrides, **changes)


def losses(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / RECONSTRUCTION_FILE).read_text())["blocks"]
    return found


def test_one_command_makes_a_checkpoint_with_its_record(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    heard: list[Any] = []
    made = maskgen.run(request(model_dir("llama", dtype=torch.bfloat16), text_file, tmp_path / "out"), heard.append)
    assert isinstance(made, maskgen.PruneResult) and isinstance(made.quality, Quality)
    assert made.quality.method == "reconstruct" and not (tmp_path / "out.work").exists()
    assert [entry["block"] for entry in losses(made.out)] == list(range(models.LAYERS))
    assert all(0 < entry["after"] < entry["before"] for entry in losses(made.out))
    assert json.loads((made.out / RECIPE_FILE).read_text())["prior"]["name"] == "admm"
    said = [event.what for event in heard if isinstance(event, maskgen.SweepProgress)]
    assert sum(what.startswith("reconstruction, epoch 2 of 2, loss ") for what in said) == models.LAYERS
    checkpoint = SparseCheckpoint.open(made.out)
    assert checkpoint.weight_dtype(checkpoint.config.targets[0]) == torch.bfloat16


@pytest.mark.parametrize("values", ["float", "int8"])
def test_goes_on_from_the_weights_of_another_result(
    values: str, model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense, first = model_dir("llama", dtype=torch.bfloat16), tmp_path / "first"
    maskgen.prune(
        maskgen.PruneRequest(
            recipe="sparsegpt", model=dense, data=text_file, out=first, overrides=dict(list(SHORT.items())[:2])
        )
    )
    if values == "int8":
        maskgen.quantise(maskgen.QuantiseRequest(model=first, values="int8", out=tmp_path / "int8"))
        first = tmp_path / "int8"
    made = maskgen.run(request(dense, text_file, tmp_path / "out", prior=first))
    assert isinstance(made, maskgen.PruneResult)
    before, after = SparseCheckpoint.open(first), SparseCheckpoint.open(made.out)
    assert before.config.mask_digest == after.config.mask_digest
    name = after.config.targets[0]
    assert not torch.equal(before.packed(name).unpack(), after.packed(name).unpack())
    assert "prior" not in json.loads((made.out / RECIPE_FILE).read_text())
    other = maskgen.run(request(dense, text_file, tmp_path / "own"))
    assert isinstance(other, maskgen.PruneResult)
    assert losses(made.out)[0]["before"] != losses(other.out)[0]["before"]


def test_masks_alone_start_from_the_dense_weights(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense, masks = model_dir(), tmp_path / "masks.safetensors"
    maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=dense, out=tmp_path / "first", masks_out=masks))
    from_masks = maskgen.run(request(dense, text_file, tmp_path / "a", prior=masks))
    from_weights = maskgen.run(request(dense, text_file, tmp_path / "b", prior=tmp_path / "first"))
    assert isinstance(from_masks, maskgen.PruneResult) and isinstance(from_weights, maskgen.PruneResult)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two, "magnitude leaves weights as they are"


def test_another_start_does_not_continue_a_run(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    """Two results with the same masks and other weights are two starts."""

    def stop(event: maskgen.Event) -> None:
        if isinstance(event, maskgen.SweepProgress) and event.block == 1:
            raise KeyboardInterrupt

    dense = model_dir("llama", dtype=torch.bfloat16)
    maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=dense, out=tmp_path / "first"))
    maskgen.quantise(maskgen.QuantiseRequest(model=tmp_path / "first", values="int8", out=tmp_path / "int8"))
    with pytest.raises(KeyboardInterrupt):
        maskgen.run(request(dense, text_file, tmp_path / "out", prior=tmp_path / "first"), stop)
    with pytest.raises(OutputExistsError, match="belongs to another run"):
        maskgen.run(request(dense, text_file, tmp_path / "out", prior=tmp_path / "int8"))
    done = maskgen.run(request(dense, text_file, tmp_path / "out", prior=tmp_path / "first"))
    assert isinstance(done, maskgen.PruneResult) and done.sweep.resumed_blocks == 1


def test_a_start_whose_norms_were_trained_is_refused(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    training = {"steps": 2, "batch": 2, "window_tokens": 16, "heldout_windows": 5, "dtype": "float32", "scope": "all"}
    dense, overrides = model_dir(), {f"train.{key}": value for key, value in training.items()}
    maskgen.learn(
        maskgen.LearnRequest(
            recipe="adaptive_sparse", model=dense, data=text_file, out=tmp_path / "trained", overrides=overrides
        )
    )
    with pytest.raises(RecipeError, match=r"trained: \d+ tensors of layers that stay dense were trained too, such as"):
        maskgen.run(request(dense, text_file, tmp_path / "out", prior=tmp_path / "trained"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_starts_that_do_not_fit_are_refused(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense, other = model_dir(), models.save("llama", tmp_path / "other", seed=1)
    models.save_corrected(dense, tmp_path / "corrected", PooledCorrection(16, "fixed"))
    with pytest.raises(RecipeError, match="corrected: has a correction beside its weights"):
        maskgen.run(request(dense, text_file, tmp_path / "out", prior=tmp_path / "corrected"))
    models.save_sparse(other, tmp_path / "foreign")
    with pytest.raises(FormatError, match="`prior`: made for the weights"):
        maskgen.run(request(dense, text_file, tmp_path / "out", prior=tmp_path / "foreign"))
    no_start = tmp_path / "mine.toml"
    no_start.write_text('[method]\nname = "reconstruct"\n')
    with pytest.raises(RecipeError, match=r"reconstruct starts from a mask: give `prior`, or a \[prior\] section"):
        maskgen.run(maskgen.LearnRequest(recipe=str(no_start), model=dense, data=text_file, out=tmp_path / "out"))
    with pytest.raises(DataError, match="method reconstruct needs calibration text"):
        maskgen.run(maskgen.LearnRequest(recipe="reconstruct", model=dense, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()
