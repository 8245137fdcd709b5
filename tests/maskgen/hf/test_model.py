"""Models and tokenizers are loaded strictly: what cannot be used is one clear error."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgen.core.errors import DataError, ModelError, StorageError
from maskgen.core.failures import explained
from maskgen.hf import model
from tests import models


def test_load_keeps_the_stored_dtype_unless_told(model_dir: Callable[..., Path]) -> None:
    path = model_dir("llama", dtype=torch.bfloat16)
    loaded = model.load(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {parameter.dtype for parameter in model.load(path, torch.float32).parameters()} == {torch.float32}
    assert model.max_tokens(loaded) == models.MAX_TOKENS


def test_an_outline_needs_no_weights(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    path = model_dir("qwen2")
    shutil.copy(path / "config.json", tmp_path)
    outline, loaded = model.outline(tmp_path), model.load(path)
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    assert {name: tensor.shape for name, tensor in outline.state_dict().items()} == {
        name: tensor.shape for name, tensor in loaded.state_dict().items()
    }


def test_tokens_without_a_row_of_the_embedding_are_named(model_dir: Callable[..., Path]) -> None:
    """A tokenizer may know more tokens than the model has rows, as Gemma 3's does, if the text has none of them."""
    path, tokenizer = model_dir(), models.tokenizer()
    tokenizer.add_tokens(["<tool>"])
    (number,) = tokenizer.convert_tokens_to_ids(["<tool>"])
    assert number == models.VOCABULARY
    model.check_ids(torch.tensor([[0, number - 1]]), tokenizer.get_vocab(), path)
    model.check_ids(torch.tensor([], dtype=torch.long), tokenizer.get_vocab(), path)
    message = rf"the text has token {number} \('<tool>'\), but the model's embedding has {models.VOCABULARY} rows"
    with pytest.raises(DataError, match=message):
        model.check_ids(torch.tensor([[0, number]]), tokenizer.get_vocab(), path)


def test_a_missing_weight_is_an_error_not_a_random_one(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir("llama"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        model.load(broken)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "transformers cannot load it"),
        (lambda path: (path / "config.json").unlink(), "transformers cannot load it"),
        (lambda path: (path / "config.json").write_text('{"model_type": "nobody"}'), "transformers cannot load it"),
        (
            lambda path: (path / "config.json").write_text(
                json.dumps(
                    {**json.loads((path / "config.json").read_text()), "quantization_config": {"quant_method": "fp8"}}
                )
            ),
            "already quantized",
        ),
    ],
)
def test_damaged_directories(
    model_dir: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    broken = shutil.copytree(model_dir("llama"), tmp_path / "broken")
    damage(broken)
    with pytest.raises(ModelError, match=message) as caught:
        model.load(broken)
    assert "\n" not in str(caught.value)


def test_a_directory_without_tokenizer(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(model_dir("llama") / "config.json", tmp_path)
    with pytest.raises(
        ModelError, match=r"no usable tokenizer: neither tokenizer\.json nor another vocabulary is there"
    ):
        model.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no usable tokenizer: (?!neither)"):
        model.load_tokenizer(tmp_path)


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "a/b/c", "org/not-downloaded"])
def test_resolve_refuses_what_is_not_there(source: str) -> None:
    with pytest.raises(ModelError, match=source) as caught:
        model.resolve(source)
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_full_of_a_download_is_no_missing_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(source: str, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/blobs/x.incomplete")

    monkeypatch.setattr(model, "snapshot_download", fill)
    with (
        pytest.raises(StorageError, match=r"/cache/blobs/x\.incomplete: No space left on device; make room"),
        explained(),
    ):
        model.resolve("org/name")


def test_resolve_takes_directories_as_they_are(tmp_path: Path) -> None:
    assert model.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="not a directory"):
        model.resolve(str(tmp_path / "file"))
