"""Digests: against hashlib on bytes written here, so that they cannot change by accident."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from maskgen.core.digest import check_digest, digest_bytes, digest_files, digest_json, digest_tensors, digest_weights
from maskgen.core.errors import FormatError


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_bytes() -> None:
    assert digest_bytes(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert check_digest(digest_bytes(b"x"), "x") == digest_bytes(b"x")


def test_json_is_canonical() -> None:
    assert digest_json({"b": [1, 2.5], "a": {"y": None, "x": "é"}}) == sha256(
        b'{"a":{"x":"\\u00e9","y":null},"b":[1,2.5]}'
    )
    assert digest_json({"b": 1, "a": 2}) == digest_json({"a": 2, "b": 1}) != digest_json({"a": 1, "b": 2})
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_json({"a": float("nan")})


def test_tensors() -> None:
    tensors = [("w", torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)), ("s", torch.tensor(3, dtype=torch.uint8))]
    expected = b"head\nw torch.bfloat16 (1, 2)\n\xc0\x3f\x00\xc0\ns torch.uint8 ()\n\x03"
    assert digest_tensors("head", tensors) == sha256(expected)
    assert digest_tensors("head", reversed(tensors)) != sha256(expected)


def test_tensors_by_value_not_by_layout() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert digest_tensors("", [("w", tensor.T.contiguous().T)]) == digest_tensors("", [("w", tensor)])


def test_files(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    lines = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in (("a", b"one"), ("b", b"two")))
    assert digest_files([tmp_path / "b", tmp_path / "a"]) == sha256(lines.encode())


def test_weights_are_the_safetensors_files_and_nothing_else(tmp_path: Path) -> None:
    for directory in (tmp_path / "one", tmp_path / "two"):
        directory.mkdir()
        (directory / "model-00001-of-00002.safetensors").write_bytes(b"x" * 10)
        (directory / "model-00002-of-00002.safetensors").write_bytes(b"y")
    digest = digest_weights(tmp_path / "one")
    (tmp_path / "two" / "config.json").write_text("{}")
    assert digest_weights(tmp_path / "two") == digest
    (tmp_path / "two" / "model-00002-of-00002.safetensors").write_bytes(b"z")
    assert digest_weights(tmp_path / "two") != digest


def test_a_model_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"no \*\.safetensors files"):
        digest_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "sha256:0", "0" * 64, "sha256:" + "g" * 64, "sha256:" + "0" * 65, None, 1])
def test_what_is_not_a_digest(text: object) -> None:
    with pytest.raises(FormatError, match=r"recipe: .* is not a digest"):
        check_digest(text, "recipe")
