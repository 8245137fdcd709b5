"""Four-bit values: the order of nibbles, groups that end with the row, and scales that are better than the largest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskgen.core import int4
from maskgen.core.errors import FormatError
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import check_scale, from_codes

TWO_FOUR = NMPattern(2, 4)
groups = st.sampled_from(int4.GROUPS)
even = st.integers(1, 150).map(lambda half: 2 * half)


def test_the_first_code_is_in_the_low_half_of_its_byte() -> None:
    codes = torch.tensor([[-8, 7, 0, -1], [1, 2, 3, -4]], dtype=torch.int8)
    octets = int4.pack_nibbles(codes)
    assert octets.tolist() == [[0x78, 0xF0], [0x21, 0xC3]]
    assert torch.equal(int4.unpack_nibbles(octets), codes)


def test_every_octet_is_two_codes() -> None:
    every = torch.arange(256).to(torch.uint8)[None]
    codes = int4.unpack_nibbles(every)
    assert sorted(set(codes.flatten().tolist())) == list(range(-8, 8))
    assert torch.equal(int4.pack_nibbles(codes), every)


def test_scales_belong_to_consecutive_kept_values() -> None:
    scale = torch.tensor([[1.0, 10.0, 100.0]])
    octets = torch.full((1, 80), 0x11, dtype=torch.uint8)
    values = from_codes(octets, scale)[0]
    assert values.tolist() == [1.0] * 64 + [10.0] * 64 + [100.0] * 32
    assert from_codes(octets, scale[:, :2])[0].tolist() == [1.0] * 128 + [10.0] * 32
    assert from_codes(octets, scale[:, 1])[0].tolist() == [10.0] * 160


@given(rows=st.integers(1, 4), kept=even, group=groups, seed=st.integers(0, 2**31))
def test_what_we_write_is_legal_and_near(rows: int, kept: int, group: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = (
        torch.randn(rows, kept, generator=generator) * torch.rand(rows, 1, generator=generator).mul(60).sub(30).exp()
    )
    octets, scale = int4.to_int4(exact, group)
    check_scale(scale, octets, "w")
    assert list(scale.shape) == int4.scale_shape(rows, kept, group)
    step = int4.spread(scale, kept)
    error = (from_codes(octets, scale) - exact).abs()
    codes = int4.unpack_nibbles(octets)
    clipped = (codes == int4.LOWEST) | (codes == int4.HIGHEST)
    assert (error[~clipped] <= 0.501 * step[~clipped]).all(), "nearest, but for what is clipped"
    assert torch.equal(int4.to_int4(exact, group)[0], octets), "the same again"


@given(kept=even, group=groups, seed=st.integers(0, 2**31))
def test_scales_are_at_least_as_good_as_the_largest_value_s(kept: int, group: int | None, seed: int) -> None:
    exact = torch.randn(2, kept, generator=torch.Generator().manual_seed(seed))
    octets, scale = int4.to_int4(exact, group)
    size = kept if group is None else group
    plain = torch.stack([part.abs().amax(1) / 7 for part in exact.split(size, dim=1)], dim=1)
    plain = plain[:, 0] if group is None else plain
    rounded = int4.nearest(exact, int4.spread(plain, kept)) * int4.spread(plain, kept)
    ours = (from_codes(octets, scale) - exact).square().sum()
    assert ours <= (rounded - exact).square().sum() * (1 + 1e-4)


def test_importance_decides_what_is_clipped() -> None:
    exact = torch.tensor([[10.0, *([1.1, -0.9] * 31), 1.0]])
    unlike = torch.ones_like(exact)
    unlike[0, 0] = 1e-6
    scales = [int4.spread(int4.fit_scales(exact, 64, weights), 64) for weights in (None, unlike)]
    plain, weighted = (int4.nearest(exact, scale) * scale for scale in scales)
    assert (weighted - exact)[0, 1:].square().sum() < (plain - exact)[0, 1:].square().sum()


def test_rows_of_zeros_and_extremes() -> None:
    limits = torch.finfo(torch.float32)
    exact = torch.tensor([[0.0, -0.0], [1e-45, 0.0], [limits.max, -limits.max], [-1e-38, 1e-38]])
    octets, scale = int4.to_int4(exact, None)
    check_scale(scale, octets, "w")
    assert scale[0] == 1.0 and torch.isfinite(from_codes(octets, scale)).all()


@pytest.mark.parametrize(
    ("kept", "shape", "group"), [(64, [3, 1], 64), (96, [3, 1], 128), (96, [3, 2], 64), (96, [3], None)]
)
def test_the_group_is_told_by_the_scales(kept: int, shape: list[int], group: int | None) -> None:
    assert int4.group_of(kept, shape) == group


@pytest.mark.parametrize("shape", [[3, 3], [3, 0], [3, 2, 1], []])
def test_scales_that_fit_no_group(shape: list[int]) -> None:
    with pytest.raises(
        FormatError, match=r"up: scale .* for 96 kept values a row, expected one scale a row, or one for"
    ):
        int4.group_of(96, shape, "up")


def test_an_odd_number_of_values_is_refused() -> None:
    with pytest.raises(FormatError, match="3 kept values a row, expected an even number"):
        int4.to_int4(torch.ones(2, 3), None)


@pytest.mark.parametrize("group", int4.GROUPS)
def test_a_weight_keeps_its_group_and_is_rounded_once(group: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 320)
    packed = PackedTensor.pack(weight, TWO_FOUR.mask_from_scores(weight.abs()), TWO_FOUR)
    coded = packed.quantised("int4", group)
    coded.verify("up")
    assert (coded.kind, coded.group, coded.shape) == ("int4", group, (5, 320))
    assert coded.quantised("int4", group) is coded
    assert torch.equal(coded.unpack() != 0, coded.mask() & (coded.unpack() != 0))
    with pytest.raises(FormatError, match="values int4 cannot become int4"):
        coded.quantised("int4", 64 if group != 64 else 128)
    assert ((coded.unpack() - weight)[coded.mask()].abs() < 1.5).all()


def test_slices_of_whole_groups_are_the_packed_slices() -> None:
    torch.manual_seed(1)
    weight = torch.randn(6, 512)
    packed = PackedTensor.pack(weight, TWO_FOUR.mask_from_scores(weight.abs()), TWO_FOUR).quantised("int4", 128)
    assert packed.scale is not None
    half = PackedTensor(packed.values[:, 64:], packed.bitmask[:, 32:], TWO_FOUR, packed.scale[:, 1:])
    half.verify("half")
    assert torch.equal(half.unpack(), packed.unpack()[:, 256:])
