"""`quantise` with text: codes chosen for what layers put out; what stays, what is refused, what a stopped run keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import LowRankCorrection, PooledCorrection
from maskgen.core.errors import DataError, FormatError, OutputExistsError, RequestError, StorageError
from maskgen.export import quantise as quantise_module
from tests import models
from tests.directories import read_all

ModelDir = Callable[..., Path]


@pytest.fixture
def places(model_dir: ModelDir, tmp_path: Path) -> Path:
    """A dense model, and `sparse` beside it, in which one layer is dense."""
    shutil.copytree(model_dir("llama", dtype=torch.bfloat16), tmp_path / "dense")
    maskgen.prune(
        maskgen.PruneRequest(
            recipe="magnitude",
            model=tmp_path / "dense",
            out=tmp_path / "sparse",
            overrides={"ignore": ["model.layers.0.mlp.down_proj"]},
        )
    )
    return tmp_path


def request(places: Path, text: Path | None, **changes: Any) -> maskgen.QuantiseRequest:
    given = {"model": places / "sparse", "out": places / "out", "data": () if text is None else text, **changes}
    return maskgen.QuantiseRequest(**{"values": "int4", **given})


def divergence(places: Path, name: str, text: Path) -> float:
    wanted = maskgen.EvaluateRequest(
        model=places / name, against=places / "sparse", data=text, max_windows=8, dtype="float32"
    )
    found = maskgen.evaluate(wanted).texts[0].divergence
    assert found is not None
    return found.kl


@pytest.mark.parametrize("group", [64, "row"])
def test_codes_by_text_come_nearer_to_the_float_values(group: Any, places: Path, text_file: Path) -> None:
    events: list[Any] = []
    result = maskgen.quantise(request(places, text_file, group=group), events.append)
    maskgen.quantise(request(places, None, group=group, out=places / "nearest"))
    assert divergence(places, "out", text_file) < 0.7 * divergence(places, "nearest", text_file)
    assert result.against_float is not None and result.against_float.kl < 0.1 and events
    assert not (places / "out.work").exists()


def test_masks_and_all_else_stay(places: Path, text_file: Path) -> None:
    maskgen.quantise(request(places, text_file))
    before, after = SparseCheckpoint.open(places / "sparse"), SparseCheckpoint.open(places / "out")
    assert after.config.values == "int4" and after.config.group == 128
    assert after.config.mask_digest == before.config.mask_digest and after.config.targets == before.config.targets
    assert (after.config.base_model, after.config.base_digest) == ("dense", before.config.base_digest)
    old, new = read_all(places / "sparse"), read_all(places / "out")
    values = {f"{name}.{kind}" for name in after.config.targets for kind in ("values", "scale")}
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items() if name not in values)


def test_what_cannot_be(places: Path, text_file: Path) -> None:
    with pytest.raises(RequestError, match="only int4 codes are chosen with text; leave it out for int8"):
        maskgen.quantise(request(places, text_file, values="int8"))
    with pytest.raises(RequestError, match="`device`: says how codes are chosen with text"):
        maskgen.quantise(request(places, None, device="cpu"))
    with pytest.raises(StorageError, match=r"nowhere\.txt"):
        maskgen.quantise(request(places, places / "nowhere.txt"))
    (places / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        maskgen.quantise(request(places, places / "bad.jsonl"))
    assert not (places / "out.work").exists(), "with other text it is another run"
    maskgen.quantise(request(places, None))
    with pytest.raises(FormatError, match="values int4 cannot become"):
        maskgen.quantise(request(places, text_file, model=places / "out", out=places / "again"))
    models.save_corrected(places / "dense", places / "corrected", PooledCorrection(16, "fixed"))
    with pytest.raises(RequestError, match="have corrections that are not low-rank"):
        maskgen.quantise(request(places, text_file, model=places / "corrected", out=places / "again"))
    assert not (places / "again").exists() and not (places / "again.work").exists()


def test_a_low_rank_correction_is_found_again_beside_the_codes(places: Path, text_file: Path) -> None:
    short = {"calibration.window_tokens": 32, "calibration.samples": 16, "method.rank": 8}
    maskgen.prune(
        maskgen.PruneRequest(
            recipe="admm-lowrank", model=places / "dense", data=text_file, overrides=short, out=places / "both"
        )
    )
    shutil.rmtree(places / "sparse")
    (places / "both").rename(places / "sparse")
    maskgen.quantise(request(places, text_file))
    maskgen.quantise(request(places, None, out=places / "nearest"))
    before, after = SparseCheckpoint.open(places / "sparse"), SparseCheckpoint.open(places / "out")
    assert after.config.correction == LowRankCorrection(8) and after.config.values == "int4"
    assert after.config.mask_digest == before.config.mask_digest
    assert divergence(places, "out", text_file) < divergence(places, "nearest", text_file)


def test_a_run_that_was_stopped_goes_on(places: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maskgen.quantise(request(places, text_file, out=places / "whole"))
    with monkeypatch.context() as patched:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(quantise_module, "quantise", stop)
        with pytest.raises(KeyboardInterrupt):
            maskgen.quantise(request(places, text_file))
    with pytest.raises(OutputExistsError, match="belongs to another run"):
        maskgen.quantise(request(places, text_file, group=64))
    maskgen.quantise(request(places, text_file))
    whole, resumed = read_all(places / "whole"), read_all(places / "out")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
