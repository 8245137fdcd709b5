"""Downloads that were cut off: every verb names the file in one line, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import models
from tests.maskgen.cli.test_parser import SMALL, run

ModelDir = Callable[..., Path]
VERBS = ("run", "learn", "permute", "eval", "compress")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def argv(verb: str, model: Path, text: Path, masks: Path, out: Path) -> list[object]:
    data = ["--model", model, "--data", text, "--out", out]
    return {
        "run": ["run", "sparsegpt", *data, *SMALL],
        "learn": ["run", "proxsparse", *data, "--set", "train.window_tokens=32"],
        "permute": ["permute", "magnitude", "--model", model, "--out", out],
        "eval": ["eval", model, "--data", text, "--window", 32, "--json", out],
        "compress": ["compress", model, masks, "--out", out],
    }[verb]


@pytest.fixture
def victim(model_dir: ModelDir, tmp_path: Path) -> Path:
    models.save_sparse(model_dir(), tmp_path / "sparse")
    return shutil.copytree(model_dir(), tmp_path / "bad")


def refuses(verb: str, victim: Path, text: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    folder = victim.parent
    before = {path.name for path in folder.iterdir()}
    code, _, errors = run(capsys, *argv(verb, victim, text, folder / "sparse", folder / "out"))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"maskgen: error: {victim / name}: "), errors
    assert {path.name for path in folder.iterdir()} == before
    return errors


@pytest.mark.parametrize("verb", VERBS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_weights_cut_at_any_byte(
    verb: str, share: float, victim: Path, model_dir: ModelDir, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = victim / "model.safetensors"
    shutil.copyfile(model_dir() / "model.safetensors", weights)
    os.truncate(weights, int(share * weights.stat().st_size))
    assert "not a valid safetensors file" in refuses(verb, victim, text_file, weights.name, capsys)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.9))
def test_settings_cut_at_any_byte(
    name: str,
    verb: str,
    share: float,
    victim: Path,
    model_dir: ModelDir,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copyfile(model_dir() / name, victim / name)
    os.truncate(victim / name, int(share * (victim / name).stat().st_size))
    assert "not valid JSON" in refuses(verb, victim, text_file, name, capsys)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_pointers_of_git_lfs(
    name: str, verb: str, victim: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (victim / name).write_text(LFS)
    assert "a pointer of Git LFS, not the file itself" in refuses(verb, victim, text_file, name, capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_a_shard_that_is_missing(
    verb: str, model_dir: ModelDir, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.save_sparse(model_dir(), tmp_path / "sparse")
    victim = shutil.copytree(model_dir(max_shard_size="100KB"), tmp_path / "bad")
    shards = sorted(set(json.loads((victim / "model.safetensors.index.json").read_text())["weight_map"].values()))
    (victim / shards[1]).unlink()
    message = refuses(verb, victim, text_file, shards[1], capsys)
    assert "no such file, though model.safetensors.index.json names it" in message
