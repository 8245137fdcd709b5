"""bfloat16 products only for what is stored in bfloat16, and only where they are fast."""

from __future__ import annotations

import pytest
import torch

from maskgen.numerics.products import float32_sums, products_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("stored", "avx", "amx", "expected"),
    [
        (torch.bfloat16, True, False, torch.bfloat16),
        (torch.bfloat16, False, True, torch.bfloat16),
        (torch.bfloat16, False, False, torch.float32),
        (torch.float16, True, True, torch.float32),
        (torch.float32, True, True, torch.float32),
    ],
)
def test_where_it_is_fast(
    stored: torch.dtype, avx: bool, amx: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert products_dtype(stored, CPU) is expected


def test_torch_still_tells_what_the_processor_can_do() -> None:
    """The two questions are not public; a torch without them must be noticed."""
    assert products_dtype(torch.bfloat16, CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_sums_are_float32_under_autocast(products: torch.dtype) -> None:
    """And what is multiplied is rounded to the dtype of products at most: never the sum."""
    x_TI = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), float32_sums(products):
        sum_II = x_TI.T @ x_TI
    rounded_TI = x_TI.to(products).double()
    assert sum_II.dtype is torch.float32
    exact, rounded = ((sum_II - (y.T @ y).float()).abs().max() / 300 for y in (x_TI.double(), rounded_TI))
    assert min(exact, rounded) < 1e-6


def test_the_setting_is_given_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), float32_sums(torch.bfloat16):
        1 / 0  # noqa: B018
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
