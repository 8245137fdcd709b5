"""The kernels of a model in the real engine, as they are and with one wrong tile in one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from sparse_serve.gate.checks import kernels as check
from sparse_serve.gate.evidence import Evidence, Limits
from sparse_serve.gate.verdict import Verdict
from sparse_serve.kernels import reference
from sparse_serve.runtime import environment
from sparse_serve.tuning import parity_file
from sparse_serve.tuning.selection import BUCKETS
from tests import models
from tests.vllm.offline import make_sparse, serve

LAYERS = 4 * models.LAYERS
"""vLLM fuses q, k and v, and gate and up."""


def test_one_wrong_tile_in_one_layer_fails_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: from five tokens on, 16 outputs of the second MLP's last layer lack 32 of its inputs."""
    sparse, _ = make_sparse("llama", tmp_path)
    prepare, linear = reference.prepare, reference.linear
    seen: list[tuple[int, int]] = []

    def prepare_and_mark(packed: PackedTensor) -> dict[str, Tensor]:
        seen.append(packed.shape)
        tensors = prepare(packed)
        if len(seen) == LAYERS:  # the last one loaded
            tile_OI = torch.zeros(packed.shape, dtype=torch.float32)
            tile_OI[16:32, 64:96] = packed.unpack()[16:32, 64:96].float()
            tensors["tile"] = tile_OI
        return tensors

    def without_the_tile(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        y_TO = linear(x_TI, tensors, bias_O)
        is_faulty = "tile" in tensors and x_TI.numel() // x_TI.shape[-1] >= 5
        return y_TO - (x_TI.float() @ tensors["tile"].T).to(y_TO.dtype) if is_faulty else y_TO

    monkeypatch.setattr(reference, "prepare", prepare_and_mark)
    monkeypatch.setattr(reference, "linear", without_the_tile)
    with environment.kernel_parity(tmp_path), serve(sparse, dtype="bfloat16", kernel="reference"):
        pass
    found = parity_file.read(tmp_path)
    assert len(found) == LAYERS * len(BUCKETS)
    wrong = [one for one in found if one.ratio > 1]
    assert [one.tokens for one in wrong] == [tokens for tokens in BUCKETS if tokens >= 5]
    (layer,) = {one.layer for one in wrong}
    for one in wrong:
        assert one.columns == (64, 95)
        assert one.rows is not None and 16 <= one.rows[0] <= one.rows[1] <= 31
    (result,) = check.run(Evidence(kernels={"candidate": found}), Limits())
    assert result.verdict is Verdict.FAIL
    assert f"1 of {LAYERS} layers are wrong, worst {layer} with " in result.summary
    assert "outputs 16 to 31, inputs 64 to 95" in result.summary


def test_kernels_as_they_are_pass_and_nobody_pays_unasked(tmp_path: Path) -> None:
    sparse, _ = make_sparse("llama", tmp_path)
    with environment.kernel_parity(tmp_path), serve(sparse, dtype="bfloat16", kernel="cpu"):
        pass
    found = parity_file.read(tmp_path)
    assert len(found) == LAYERS * len(BUCKETS)
    (result,) = check.run(Evidence(kernels={"candidate": found}), Limits())
    assert result.verdict is Verdict.PASS, result
