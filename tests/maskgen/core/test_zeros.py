"""Weights of zeros are found by name, in dense and sparse checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskgen.core.checkpoint import read_headers
from maskgen.core.zeros import zero_weights


def zeros_of(directory: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return zero_weights(read_headers(directory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_one_number_anywhere_is_enough(tmp_path: Path, dtype: torch.dtype) -> None:
    """The last one, too, which is not on the page that is read of every tensor."""
    last = torch.zeros(128, 64)
    last[-1, -1] = 1.0
    tensors = {"a.values": torch.zeros(128, 64), "b.values": last, "c.weight": torch.zeros(8, 8, 1)}
    found = zeros_of(tmp_path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert found == ["a.values", "c.weight"]


def test_vectors_and_what_is_no_weight_may_be_zero(tmp_path: Path) -> None:
    """Biases, norms as their distance from 1, corrections that correct nothing."""
    names = {"q.bias": (8,), "norm.weight": (8,), "q.correction_out": (8, 2), "q.bitmask": (8, 1)}
    names["token_type_embeddings.weight"] = (1, 8)
    assert zeros_of(tmp_path, {name: torch.zeros(shape) for name, shape in names.items()}) == []
