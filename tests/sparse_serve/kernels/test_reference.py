"""The reference kernel beyond the contract: its workspace is one tile, whatever the layer's size."""

import pytest
import torch

from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import reference


def test_rows_beyond_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_BYTES", 3 * 64 * 4)
    pattern = NMPattern(2, 4)
    weight_OI = torch.randn(10, 64)
    packed = PackedTensor.pack(weight_OI, pattern.mask_from_scores(weight_OI.abs()), pattern)
    x_TI, bias_O = torch.randn(4, 64), torch.randn(10)
    y_TO = reference.linear(x_TI, reference.prepare(packed), bias_O)
    torch.testing.assert_close(y_TO, torch.nn.functional.linear(x_TI, packed.unpack(), bias_O))


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_codes_are_worth_what_a_dense_model_would_hold(kind: str) -> None:
    """Rounded to the activations' dtype, not less exact and not more: served tokens equal those of the dense model."""
    pattern = NMPattern(2, 4)
    weight_OI = torch.randn(24, 64)
    packed = PackedTensor.pack(weight_OI, pattern.mask_from_scores(weight_OI.abs()), pattern).quantised(kind)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x_TI = torch.randn(5, 64, dtype=dtype)
        y_TO = reference.linear(x_TI, reference.prepare(packed), None)
        assert torch.equal(y_TO, torch.nn.functional.linear(x_TI, packed.unpack().to(dtype)))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_never_unpacks_more_than_a_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_BYTES", 4096)
    seen: list[int] = []
    original = reference.unpack

    def spy(values: torch.Tensor, bitmask: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        dense = original(values, bitmask, scale)
        seen.append(dense.nbytes)
        return dense

    monkeypatch.setattr(reference, "unpack", spy)
    pattern = NMPattern(2, 4)
    weight_OI = torch.randn(100, 128)
    packed = PackedTensor.pack(weight_OI, pattern.mask_from_scores(weight_OI.abs()), pattern).quantised(kind)
    reference.linear(torch.randn(1, 128), reference.prepare(packed), None)
    assert max(seen) <= 4096
    assert sum(seen) == weight_OI.nbytes
