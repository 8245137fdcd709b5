"""`admm` with a rank from a request to a checkpoint that is served like any with a correction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import LowRankCorrection
from maskgen.core.errors import RecipeError
from maskgen.hf import model

ModelDir = Callable[..., Path]
SHORT: dict[str, Any] = {"calibration.window_tokens": 32, "calibration.samples": 6, "method.rounds": 2}


def request(dense: Path, text: Path, out: Path, **changes: Any) -> maskgen.PruneRequest:
    overrides = {**SHORT, "method.rank": 4, **changes.pop("overrides", {})}
    return maskgen.PruneRequest(recipe="admm-lowrank", model=dense, data=text, out=out, **changes, overrides=overrides)


def kl(served: Path, dense: Path, text: Path) -> float:
    wanted = maskgen.EvaluateRequest(model=served, against=dense, data=text, max_windows=8, dtype="float32")
    divergence = maskgen.evaluate(wanted).texts[0].divergence
    assert divergence is not None
    return float(divergence.kl)


def test_it_is_closer_to_dense_than_the_two_in_turn(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense = model_dir("llama", dtype=torch.bfloat16)
    maskgen.prune(request(dense, text_file, tmp_path / "both"))
    maskgen.prune(request(dense, text_file, tmp_path / "alone", overrides={"method.rank": 0}))
    eora = {key: value for key, value in SHORT.items() if key != "method.rounds"} | {"method.rank": 4}
    maskgen.prune(
        maskgen.PruneRequest(
            recipe="eora", model=dense, prior=tmp_path / "alone", data=text_file, out=tmp_path / "turn", overrides=eora
        )
    )
    both, turn, alone = (kl(tmp_path / name, dense, text_file) for name in ("both", "turn", "alone"))
    assert both < turn < alone
    config = SparseCheckpoint.open(tmp_path / "both").config
    assert config.correction == LowRankCorrection(4) == SparseCheckpoint.open(tmp_path / "turn").config.correction
    assert SparseCheckpoint.open(tmp_path / "alone").config.correction is None


def test_codes_and_corrections_are_read_as_they_were_made(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    values = {"values.kind": "int4", "values.group": 64}
    dense = model_dir("llama")
    maskgen.prune(request(dense, text_file, tmp_path / "out", overrides=values))
    checkpoint, served = SparseCheckpoint.open(tmp_path / "out"), dict(model.load(tmp_path / "out").named_modules())
    assert checkpoint.config.values == "int4" and checkpoint.config.correction == LowRankCorrection(4)
    for name in checkpoint.config.targets:
        assert torch.equal(served[name].weight, checkpoint.layer(name).dense(torch.float32))


def test_masks_of_another_method_stay(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense = model_dir("llama")
    maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=dense, out=tmp_path / "before"))
    overrides = {"method.mask": "prior"}
    maskgen.prune(request(dense, text_file, tmp_path / "out", prior=tmp_path / "before", overrides=overrides))
    before, after = (SparseCheckpoint.open(tmp_path / name).config for name in ("before", "out"))
    assert after.mask_digest == before.mask_digest and after.correction == LowRankCorrection(4)


def test_a_rank_that_is_too_large_is_refused(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    wanted = request(model_dir("llama"), text_file, tmp_path / "out", overrides={"method.rank": 33})
    with pytest.raises(RecipeError, match=r"method admm: .*k_proj: .* rank of 33 is too large .* at most 32"):
        maskgen.prune(wanted)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()
