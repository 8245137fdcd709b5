"""What a run says of the quality of what it made: measured on text that nothing was made from, and kept beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import ModelError, RequestError
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


def test_both_models_are_measured_in_one_arithmetic(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    """A model that training leaves as it is does not differ from the dense one by the rounding of its activations."""
    dense, changes = model_dir(dtype=torch.bfloat16), {"train.distill_weight": 0.0, "train.lr": 1e-12}
    request = learn(dense, text_file, tmp_path / "out", recipe="dense_control", overrides={**TRAINING, **changes})
    made = maskgen.learn(request)
    assert isinstance(made, maskgen.LearnResult) and isinstance(made.quality, Quality)
    assert made.quality.kl == pytest.approx(0.0, abs=1e-9) and made.quality.agreement == 1.0


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
    assert not (again.out / QUALITY_FILE).exists()
    assert maskgen.inspect(maskgen.InspectRequest(model=again.out)).quality is None


def evaluation(model: Path, dense: Path, *texts: Path, **changes: Any) -> maskgen.EvaluateRequest:
    return maskgen.EvaluateRequest(
        model=model, against=dense, data=texts, window_tokens=32, keep=True, **{"max_windows": 3, **changes}
    )


def test_what_evaluate_found_is_kept_on_request(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    made = maskgen.prune(prune(model_dir(), text_file, tmp_path / "out", recipe="wanda"))
    assert isinstance(made, maskgen.PruneResult)
    small = maskgen.quantise(maskgen.QuantiseRequest(model=made.out, values="int8", out=tmp_path / "int8")).out
    (tmp_path / "other.txt").write_text(models.TEXT[9000:12000])
    found = maskgen.evaluate(evaluation(small, model_dir(), text_file, tmp_path / "other.txt", max_windows=4))
    kept = maskgen.inspect(maskgen.InspectRequest(model=small)).quality
    assert kept is not None and kept == found.quality == read_quality(small)
    assert (kept.method, kept.pattern, kept.windows, kept.window_tokens, kept.bos) == ("wanda", "2:4", 8, 32, False)
    assert kept.texts == (text_file.name, "other.txt")
    nlls = [nll for text in found.texts for nll in text.perplexity.nll_per_window]
    assert np.log(kept.perplexity) == pytest.approx(np.mean(nlls))
    first, second = (text.divergence for text in found.texts)
    assert first is not None and second is not None
    assert kept.kl == pytest.approx((first.kl + second.kl) / 2)
    assert kept.agreement == pytest.approx((first.agreement + second.agreement) / 2)
    assert np.log(kept.dense_perplexity) < np.log(kept.perplexity)
    again = maskgen.evaluate(evaluation(small, model_dir(), text_file))
    assert again.quality == read_quality(small) != kept, "an older one is replaced"
    assert maskgen.evaluate(evaluation(small, model_dir(), text_file, max_windows=2).model_copy(update={"keep": False}))
    assert read_quality(small) == again.quality


def test_a_model_that_says_nothing_of_its_method(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    models.save_sparse(model_dir(), tmp_path / "sparse")
    for recipe in (None, '{"method": 3}', '{"method": {"name": "../x"}}'):
        if recipe is not None:
            (tmp_path / "sparse" / "maskgen_recipe.json").write_text(recipe)
        quality = maskgen.evaluate(evaluation(tmp_path / "sparse", model_dir(), text_file)).quality
        assert quality is not None and quality.method == "unknown"
    masked = maskgen.decompress(maskgen.DecompressRequest(model=tmp_path / "sparse", out=tmp_path / "dense")).out
    quality = maskgen.evaluate(evaluation(masked, model_dir(), text_file)).quality
    assert quality is not None and quality.pattern == "" and read_quality(masked) == quality


def test_what_cannot_be_kept_is_refused_before_anything_is_measured(
    model_dir: ModelDir, text_file: Path, tmp_path: Path
) -> None:
    sparse = tmp_path / "sparse"
    models.save_sparse(model_dir(), sparse)
    alone = maskgen.EvaluateRequest(model=sparse, data=text_file, keep=True)
    hub = evaluation(sparse, model_dir(), text_file).model_copy(update={"model": "org/name"})
    many = maskgen.EvaluateRequest(model=sparse, against=model_dir(), data=[text_file] * 17, keep=True)
    for request, message in ((alone, "give that as `against`"), (hub, "not a directory"), (many, "17 texts")):
        with pytest.raises(RequestError, match=f"`keep`: .*{message}"):
            maskgen.evaluate(request)
    other = shutil.copytree(model_dir(), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"`against` .*other: its weights have digest .*; give that model"):
        maskgen.evaluate(evaluation(sparse, other, text_file))
    assert read_quality(sparse) is None


def test_another_dense_model_is_said(
    model_dir: ModelDir, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be meant, as with a model of another seed; but nobody is to take it for what pruning cost."""
    models.save_sparse(model_dir(), tmp_path / "sparse")
    models.save("llama", tmp_path / "other", seed=1)
    request = {"model": tmp_path / "sparse", "data": text_file, "window_tokens": 32, "max_windows": 2}
    maskgen.evaluate(maskgen.EvaluateRequest(against=model_dir(), **request))
    assert not caplog.records
    maskgen.evaluate(maskgen.EvaluateRequest(against=tmp_path / "other", **request))
    assert "other: its weights have digest" in caplog.text
