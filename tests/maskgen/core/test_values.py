"""Eight-bit values: symmetric codes, one scale a row, and nothing a reader must refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.errors import FormatError
from maskgen.core.values import (
    CODE_DTYPES,
    FLOAT,
    FP8,
    INT4,
    INT8,
    LARGEST,
    check_codes,
    check_scale,
    from_codes,
    kind_of,
    to_codes,
)

EIGHT_BITS = (INT8, FP8)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.integers(1, 6).flatmap(lambda width: st.lists(st.lists(finite, min_size=width, max_size=width), min_size=1))


@given(rows, st.sampled_from(EIGHT_BITS))
def test_what_we_write_is_legal_and_near(values: list[list[float]], kind: str) -> None:
    exact_OV = torch.tensor(values)
    codes_OV, scale_O = to_codes(exact_OV, kind)
    check_codes(codes_OV, "w")
    check_scale(scale_O, codes_OV, "w")
    assert kind_of(codes_OV.dtype) == kind
    assert (codes_OV.float().abs() <= LARGEST[kind]).all()
    back_OV = from_codes(codes_OV, scale_O).double()
    step_OV = scale_O[:, None].double() * torch.ones_like(back_OV)
    if kind == FP8:  # three bits behind the leading one, and 2^-9 between the smallest
        step_OV = torch.maximum(exact_OV.double().abs() / 8, step_OV * 2**-9)
    assert ((back_OV - exact_OV.double()).abs() <= step_OV * 0.501).all()
    assert (back_OV.sign() * exact_OV.sign() >= 0).all()


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_the_largest_value_of_each_row_sets_its_scale(kind: str) -> None:
    codes_OV, scale_O = to_codes(torch.tensor([[1.0, -3.0], [0.5, 0.25]]), kind)
    assert scale_O.tolist() == pytest.approx([3 / LARGEST[kind], 0.5 / LARGEST[kind]])
    assert [codes_OV[0, 1].item(), codes_OV[1, 0].item()] == [-LARGEST[kind], LARGEST[kind]]


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_rows_of_zeros_and_of_almost_nothing(kind: str) -> None:
    codes_OV, scale_O = to_codes(torch.tensor([[0.0, -0.0], [1e-45, 0.0], [1e-38, -1e-38]]), kind)
    assert scale_O[0] == 1.0
    assert scale_O[1:].tolist() == [torch.finfo(torch.float32).tiny] * 2
    assert torch.isfinite(from_codes(codes_OV, scale_O)).all()
    assert (codes_OV[0].float() == 0).all()


def test_zero_is_zero_and_signs_are_symmetric() -> None:
    values_OV = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for kind in EIGHT_BITS:
        codes, scale = to_codes(values_OV, kind)
        mirrored, mirrored_scale = to_codes(-values_OV, kind)
        assert torch.equal(codes.float(), -mirrored.float()) and torch.equal(scale, mirrored_scale)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_bfloat16_values_are_quantised_from_what_they_are(kind: str) -> None:
    values_OV = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for ours, same in zip(to_codes(values_OV, kind), to_codes(values_OV.float(), kind), strict=True):
        assert torch.equal(ours.float(), same.float())


def test_kinds() -> None:
    assert [kind_of(dtype) for dtype in (torch.float32, torch.int8, torch.float8_e4m3fn)] == [FLOAT, INT8, FP8]
    assert kind_of(torch.uint8) == INT4
    for dtype in (torch.float64, torch.float8_e5m2, torch.int32):
        with pytest.raises(FormatError, match=f"up: values {dtype}, expected one of"):
            kind_of(dtype, "up")


CODES = torch.zeros(2, 3, dtype=torch.int8)
OCTETS = torch.zeros(2, 48, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("scale", "values", "message"),
    [
        (None, CODES, "up: values torch.int8 without a scale"),
        (torch.ones(2), CODES.float(), "up: values torch.float32 with a scale"),
        (torch.ones(3), CODES, r"up: scale torch.float32 \[3\], expected float32 \[2\]"),
        (torch.ones(2, 1), CODES, r"up: scale torch.float32 \[2, 1\]"),
        (torch.ones(2).double(), CODES, "up: scale torch.float64"),
        (torch.tensor([1.0, 0.0]), CODES, r"up: scale of row 1 is 0\.0, expected above 0 and finite times 127"),
        (torch.tensor([-1.0, 1.0]), CODES, r"up: scale of row 0 is -1\.0"),
        (torch.tensor([float("inf"), 1.0]), CODES, "up: scale of row 0 is inf"),
        (torch.tensor([3e36, 1.0]), CODES, "up: scale of row 0 is 3"),
        (torch.tensor([1.0, float("nan")]), CODES, "up: scale of row 1 is nan"),
        (None, OCTETS, "up: values torch.uint8 without a scale"),
        (torch.ones(3), OCTETS, r"up: scale torch.float32 \[3\], expected float32 \[2\]"),
        (
            torch.ones(2, 3),
            OCTETS,
            r"up: scale \[2, 3\] for 96 kept values a row, expected one scale a row, or one for",
        ),
        (torch.ones(3, 2), OCTETS, r"up: scale torch.float32 \[3, 2\], expected float32 \[2, 2\]"),
        (torch.ones(2, 2).half(), OCTETS, "up: scale torch.float16"),
        (torch.tensor([[1.0, 1.0], [1.0, 0.0]]), OCTETS, r"up: scale of row 1, group 1 is 0\.0, .* finite times 8"),
        (torch.tensor([[1.0, -1e-3], [1.0, 1.0]]), OCTETS, r"up: scale of row 0, group 1 is -0\.001"),
        (torch.tensor([1.0, 1e38]), OCTETS, r"up: scale of row 1 is 9\.9"),
    ],
)
def test_scales_that_are_refused(scale: Tensor | None, values: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        check_scale(scale, values, "up")


@pytest.mark.parametrize(
    ("kind", "legal", "illegal", "message"),
    [
        (INT8, range(-128, 128), [], ""),
        (FP8, [bits for bits in range(256) if bits & 0x7F != 0x7F], [0x7F, 0xFF], "NaN"),
    ],
)
def test_every_code(kind: str, legal: list[int], illegal: list[int], message: str) -> None:
    def as_codes(bits: list[int]) -> Tensor:
        raw = torch.tensor([bits], dtype=torch.int16)
        return raw.to(torch.int8) if kind == INT8 else raw.to(torch.uint8).view(CODE_DTYPES[FP8])

    check_codes(as_codes(list(legal)), "up")
    assert torch.isfinite(as_codes(list(legal)).float()).all()
    for bits in illegal:
        with pytest.raises(FormatError, match=f"up: values: code 2 of row 0 is {message}"):
            check_codes(as_codes([0, 1, bits]), "up")
