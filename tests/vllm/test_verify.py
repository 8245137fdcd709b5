"""Stock vLLM verifies a whole sparse checkpoint too, once, where it makes the engine's configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import FormatError
from sparse_serve.engine import vllm_defaults, vllm_engine
from sparse_serve.runtime import environment
from sparse_serve.runtime.errors import SettingsError
from tests.vllm.serving import damage_digest, make_checkpoint, put_on_hub


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environment, "_VERIFIED", "_SPARSE_SERVE_VERIFIED_BY_A_TEST")
    monkeypatch.setenv(environment._VERIFIED, "")  # taken away afterwards
    return make_checkpoint(tmp_path)


def test_masks_of_another_run_are_refused_by_vllm(checkpoint: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def configure() -> Any:
        return EngineArgs(model=str(checkpoint), dtype="float32").create_engine_config()

    assert configure().model_config.quantization == "sparse_nm"
    damage_digest(checkpoint)
    with pytest.raises(ValueError, match="the stored masks have digest"):
        configure()


def test_the_same_files_are_read_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_serve.plugin.config import verify

    opened: list[str] = []
    really_open = SparseCheckpoint.open
    monkeypatch.setattr(SparseCheckpoint, "open", lambda path: (opened.append(path), really_open(path)))
    verify(str(checkpoint))
    verify(str(checkpoint))
    assert opened == [str(checkpoint)]
    shard = checkpoint / "model.safetensors"
    os.utime(shard, ns=(0, 0))
    verify(str(checkpoint))
    assert len(opened) == 2


def test_a_refused_checkpoint_stays_refused(checkpoint: Path) -> None:
    from sparse_serve.plugin.config import verify

    damage_digest(checkpoint)
    for _ in range(2):
        with pytest.raises(FormatError, match="the stored masks have digest"):
            verify(str(checkpoint))


async def test_our_server_refuses_a_sparse_model_that_is_no_directory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another hub than Hugging Face's would come down to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(checkpoint.parent))
    monkeypatch.setattr(vllm_defaults, "resolve_hub_model", lambda *given: None)
    engine = vllm_engine.VllmEngine(put_on_hub(checkpoint, checkpoint.parent), ["--dtype=float32"])
    try:
        with pytest.raises(SettingsError, match="tests/tiny is sparse, but no directory to verify"):
            await engine.start()
    finally:
        await engine.stop(0.0)
