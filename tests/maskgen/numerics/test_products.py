"""bfloat16 products only for what is stored in bfloat16, and only where they are fast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from maskgen.numerics.products import ProductsDtype, bfloat16_products, float32_sums, products_dtype, settled_dtype
from tests.maskgen.arithmetic import ProductDtypes, processor_has_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("stored", "has", "expected"),
    [
        (torch.bfloat16, "avx", torch.bfloat16),
        (torch.bfloat16, "amx", torch.bfloat16),
        (torch.bfloat16, "arm", torch.bfloat16),
        (torch.bfloat16, "", torch.float32),
        (torch.float16, "avx amx", torch.float32),
        (torch.float32, "avx amx", torch.float32),
    ],
)
def test_where_it_is_fast(
    stored: torch.dtype, has: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has_bfloat16(monkeypatch, "avx" in has, "amx" in has, "arm" in has)
    assert products_dtype(stored, CPU) is expected


def test_torch_still_tells_what_the_processor_can_do() -> None:
    """Two of the questions are not public; a torch without them must be noticed."""
    assert products_dtype(torch.bfloat16, CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("wanted", "fast", "expected"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("float32", True, "float32"),
    ],
)
def test_auto_is_what_the_device_is_fast_in(
    wanted: ProductsDtype, fast: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has_bfloat16(monkeypatch, fast)
    assert settled_dtype(wanted, CPU) == expected


@pytest.mark.parametrize("bias", [False, True])
def test_a_processor_without_bfloat16_rounds_once(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what multiplies is float32: such a processor emulates everything else, many times slower."""
    processor_has_bfloat16(monkeypatch, False)
    generator = torch.Generator().manual_seed(0)
    x_TI, w_OI, b_O = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((16, 40), (24, 40), (24,)))
    layer = torch.nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(w_OI)
        if bias:
            layer.bias.copy_(b_O)
    exact_TO = x_TI.double() @ w_OI.double().T + (b_O.double() if bias else 0)
    with torch.no_grad(), bfloat16_products(CPU), ProductDtypes() as dtypes:
        y_TO = layer(x_TI)
    assert dtypes.seen == {torch.float32}
    assert y_TO.dtype is torch.bfloat16 and (y_TO.double() - exact_TO).abs().max() <= 2**-8 * exact_TO.abs().max()


@pytest.mark.parametrize(
    ("fast", "dtype", "tokens"),
    [
        (True, torch.bfloat16, 16),
        (False, torch.bfloat16, 15),
        (False, torch.float32, 16),
        (False, torch.float16, 16),
    ],
)
def test_all_else_is_multiplied_as_it_is(
    fast: bool, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has_bfloat16(monkeypatch, fast)
    x_TI, w_OI = torch.randn(tokens, 40).to(dtype), torch.randn(24, 40).to(dtype)
    expected_TO = functional.linear(x_TI, w_OI)
    with bfloat16_products(CPU), ProductDtypes() as dtypes:
        assert torch.equal(functional.linear(x_TI, w_OI), expected_TO)
    assert dtypes.seen == {dtype}


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
