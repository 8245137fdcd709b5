"""A GGUF file in place of a model directory, through the Python interface."""

from __future__ import annotations

from pathlib import Path

import pytest

import maskgen
from maskgen.api import checks
from maskgen.core.checkpoint import SparseCheckpoint
from tests import gguf_files
from tests.maskgen.api.test_functions import Heard, prune, stages


def test_a_gguf_file_is_a_model(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, heard = tmp_path / "tiny.gguf", Heard()
    gguf_files.save(file)
    result = maskgen.prune(prune(file, text_file, tmp_path / "sparse", recipe="magnitude", overrides={}), heard)
    assert isinstance(result, maskgen.PruneResult)
    assert stages(heard) == [
        "reading tiny.gguf",
        "converting tiny.gguf",
        "loading",
        "measuring",
        "measuring",
        "writing",
    ]
    assert SparseCheckpoint.open(result.out).config.base_model == "tiny"

    dense = maskgen.decompress(maskgen.DecompressRequest(model=file, out=tmp_path / "dense"))
    assert dense.total_bytes > (dense.out / "model.safetensors").stat().st_size
    scored = [
        maskgen.evaluate(maskgen.EvaluateRequest(model=one, data=text_file, window_tokens=32, max_windows=3))
        for one in (file, dense.out)
    ]
    assert scored[0].value == scored[1].value and scored[0].model == "tiny"
    made = maskgen.compress(maskgen.CompressRequest(model=file, masks=result.out, out=tmp_path / "again"))
    assert (made.out / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()


def test_one_process_of_a_group_speaks(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf_files.save(tmp_path / "tiny.gguf")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")  # as torchrun sets it
    monkeypatch.setenv("RANK", "1")
    heard = Heard()
    assert checks.find_model(str(tmp_path / "tiny.gguf"), heard).is_dir() and not heard
