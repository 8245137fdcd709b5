"""What a run says of the quality of what it made: measured on text that nothing was made from, and kept beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import ModelError
from maskgen.core.quality import QUALITY_FILE, Quality, read_quality
from maskgen.data.bos import Bos
from maskgen.data.heldout import HeldOut
from maskgen.data.tokens import read_tokens
from maskgen.hf.pruning_cost import Baseline
from tests import models
from tests.maskgen.api.test_functions import CALIBRATION, TRAINING, learn, prune

ModelDir = Callable[..., Path]


def heldout_file(folder: Path, text: Path) -> Path:
    """The windows that a one-shot run holds out of a text, as token ids."""
    heldout = HeldOut(1, models.MAX_TOKENS, Bos())
    heldout.take(text, read_tokens(text, models.tokenizer()))
    ids_ST = heldout.windows()
    assert ids_ST is not None and len(ids_ST) > 1
    np.save(folder / "heldout.npy", ids_ST.flatten().numpy())
    return folder / "heldout.npy"


@pytest.mark.parametrize(("recipe", "overrides"), [("wanda", CALIBRATION), ("magnitude", {})])
def test_a_one_shot_run_measures_what_evaluate_does(
    recipe: str, overrides: dict[str, Any], model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense = model_dir("llama", dtype=torch.bfloat16)
    result = maskgen.prune(prune(dense, text_file, tmp_path / "out", recipe=recipe, overrides=overrides))
    assert isinstance(result, maskgen.PruneResult) and isinstance(result.quality, Quality)
    assert read_quality(result.out) == result.quality and SparseCheckpoint.open(result.out)
    (found,) = maskgen.evaluate(
        maskgen.EvaluateRequest(
            model=result.out, against=dense, data=heldout_file(tmp_path, text_file), window_tokens=models.MAX_TOKENS
        )
    ).texts
    assert found.dense is not None and found.divergence is not None
    assert result.quality.windows == len(found.windows)
    assert result.quality.perplexity == pytest.approx(found.value, rel=1e-6)
    assert result.quality.dense_perplexity == pytest.approx(found.dense.value, rel=1e-6)
    assert result.quality.kl == pytest.approx(found.divergence.kl, rel=1e-6)
    assert result.quality.agreement == found.divergence.agreement
    assert (result.quality.method, result.quality.pattern, result.quality.texts) == (recipe, "2:4", (text_file.name,))


def test_a_killed_run_still_knows_the_dense_model(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    def stop(event: maskgen.Event) -> None:
        if isinstance(event, maskgen.SweepProgress) and event.block == 2:
            raise KeyboardInterrupt

    whole = maskgen.prune(prune(model_dir(), text_file, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        maskgen.prune(prune(model_dir(), text_file, tmp_path / "killed"), stop)
    killed = maskgen.prune(prune(model_dir(), text_file, tmp_path / "killed"))
    assert isinstance(whole, maskgen.PruneResult) and isinstance(killed, maskgen.PruneResult)
    assert killed.sweep.resumed_blocks == 2 and killed.quality == whole.quality


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("maskllm", {}), ("adaptive_sparse", {}), ("dense_control", {"train.distill_weight": 0.0})],
)
def test_a_learned_run_measures_what_it_writes(
    recipe: str, changes: dict[str, Any], model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    dense = model_dir()
    made = maskgen.learn(learn(dense, text_file, tmp_path / "out", recipe=recipe, overrides={**TRAINING, **changes}))
    assert isinstance(made, maskgen.LearnResult) and isinstance(made.quality, Quality)
    assert read_quality(made.out) == made.quality and made.quality.windows == TRAINING["train.heldout_windows"]
    last = [record for record in made.records if record["kind"] == "eval"]
    assert made.quality.perplexity == pytest.approx(last[-1]["perplexity"], rel=1e-4)
    assert made.quality.dense_perplexity == pytest.approx(last[0]["dense_perplexity"], rel=1e-4)
    assert made.quality.kl > 0 and made.quality.pattern == ("" if recipe == "dense_control" else "2:4")


def test_without_a_number_there_is_the_reason(
    model_dir: ModelDir, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = maskgen.prune(prune(model_dir(), text_file, tmp_path / "a", recipe="magnitude", overrides={}, data=()))
    assert isinstance(alone, maskgen.PruneResult) and "no text was given; with `data`" in str(alone.quality)
    (tmp_path / "short.txt").write_text(text_file.read_text()[:400])
    short = maskgen.prune(prune(model_dir(), tmp_path / "short.txt", tmp_path / "b"))
    assert isinstance(short, maskgen.PruneResult) and "too short to hold any of it out" in str(short.quality)

    def fail(*args: object) -> Baseline:
        raise ModelError("the dense model cannot be run on text alone: it wants pictures")

    def exhaust(*args: object) -> Baseline:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(Baseline, "record", exhaust)
    poor = maskgen.prune(prune(model_dir(), text_file, tmp_path / "d"))
    assert isinstance(poor, maskgen.PruneResult) and "out of memory (99 bytes more" in str(poor.quality)
    monkeypatch.setattr(Baseline, "record", fail)
    blind = maskgen.prune(prune(model_dir(), text_file, tmp_path / "c"))
    assert isinstance(blind, maskgen.PruneResult) and "it wants pictures" in str(blind.quality)
    assert not any((tmp_path / name / QUALITY_FILE).exists() for name in "abcd")


def test_it_goes_when_values_change(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    made = maskgen.prune(prune(model_dir(), text_file, tmp_path / "out"))
    assert isinstance(made, maskgen.PruneResult)
    report = maskgen.inspect(maskgen.InspectRequest(model=made.out))
    assert report.quality == made.quality and report.to_dict()["quality"]["kl"] == made.quality.kl
    small = maskgen.quantise(maskgen.QuantiseRequest(model=made.out, values="int8", out=tmp_path / "int8"))
    assert small.quality_dropped and not (small.out / QUALITY_FILE).exists()
    base = shutil.copytree(model_dir(), tmp_path / "base")
    shutil.copy(made.out / QUALITY_FILE, base)
    again = maskgen.compress(maskgen.CompressRequest(model=base, masks=made.out, out=tmp_path / "again"))
    assert not again.quality_dropped and not (again.out / QUALITY_FILE).exists()
    assert maskgen.inspect(maskgen.InspectRequest(model=again.out)).quality is None
