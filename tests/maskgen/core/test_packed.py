"""Values + bitmask: bit-exact round trips, and packing commutes with slicing, as tensor parallelism needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core import packed as packed_module
from maskgen.core.errors import FormatError, NumericalError, PatternError
from maskgen.core.mask import pack_bits
from maskgen.core.packed import Correction, PackedTensor, StoredLayer, unpack
from maskgen.core.pattern import NMPattern
from tests.directories import TWO_FOUR, bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATTERNS = [NMPattern(n, m) for n, m in ((2, 4), (1, 4), (4, 8), (3, 6), (1, 2), (2, 16))]


def random_weight(pattern: NMPattern, dtype: torch.dtype, rows: int = 5, units: int = 3, seed: int = 0) -> Tensor:
    """A weight with many zeros of both signs and subnormal numbers, a few columns wider than one unit."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, units * pattern.column_multiple, generator=generator)
    special = torch.tensor([0.0, -0.0, 1.0, -1e-41, 6e-8])
    chosen = special[torch.randint(len(special), weight.shape, generator=generator)]
    return torch.where(torch.rand(weight.shape, generator=generator) < 0.5, chosen, weight).to(dtype)


def random_mask(pattern: NMPattern, weight: Tensor, seed: int = 1) -> Tensor:
    return pattern.mask_from_scores(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PATTERNS), st.sampled_from(DTYPES), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_round_trip_is_bit_exact(pattern: NMPattern, dtype: torch.dtype, rows: int, units: int, seed: int) -> None:
    weight = random_weight(pattern, dtype, rows, units, seed)
    mask = random_mask(pattern, weight, seed + 1)
    packed = PackedTensor.pack(weight, mask, pattern)
    packed.verify()
    assert packed.shape == tuple(weight.shape)
    assert packed.values.shape == (rows, pattern.kept_columns(weight.shape[1]))
    assert bits(packed.values) == b"".join(bits(row[kept]) for row, kept in zip(weight, mask, strict=True))
    expected = weight.clone()
    expected[~mask] = 0.0
    assert bits(packed.unpack()) == bits(expected)
    assert torch.equal(packed.mask(), mask)


@pytest.mark.parametrize("bytes_at_a_time", [1, 7, 4096])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_unpacking_some_rows_at_a_time_is_torchs_masked_scatter(
    pattern: NMPattern, bytes_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "_BYTES_AT_A_TIME", bytes_at_a_time)
    weight = random_weight(pattern, torch.bfloat16, rows=9)
    packed = PackedTensor.pack(weight, random_mask(pattern, weight), pattern)
    for rows in (slice(None), slice(2, 7)):
        mask = packed.mask()[rows]
        scattered = torch.zeros(mask.shape, dtype=weight.dtype).masked_scatter_(mask, packed.values[rows])
        assert bits(unpack(packed.values[rows], packed.bitmask[rows])) == bits(scattered)


@pytest.mark.parametrize("values", ["float", "int8", "fp8_e4m3"])
def test_tensors_on_the_cpu_stay_there_whatever_torchs_default_device_is(values: str) -> None:
    weight = random_weight(TWO_FOUR, torch.bfloat16)
    mask = random_mask(TWO_FOUR, weight)
    expected = PackedTensor.pack(weight, mask, TWO_FOUR).quantised(values).unpack()
    with torch.device("meta"):
        packed = PackedTensor.pack(weight, mask, TWO_FOUR).quantised(values)
        packed.verify()
        unpacked = packed.unpack()
    assert bits(unpacked) == bits(expected)


@pytest.mark.parametrize("values, byte", [(1, 0b101), (1, 0), (2, 0b1), (2, 0b111)])
def test_another_number_of_values_than_the_mask_keeps_is_refused(values: int, byte: int) -> None:
    message = f"from row 0 on, the bitmask keeps {byte.bit_count()} weights, of which {values} are stored"
    with pytest.raises(FormatError, match=message):
        unpack(torch.ones(1, values), torch.tensor([[byte]], dtype=torch.uint8))


def test_pruned_negative_weights_become_plus_zero_and_kept_minus_zero_stays() -> None:
    weight = torch.tensor([[-0.0, -1.0, 2.0, -3.0, 0.0, 0.0, -0.0, 0.0]])
    mask = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0]]) > 0
    unpacked = PackedTensor.pack(weight, mask, TWO_FOUR).unpack()
    assert torch.signbit(unpacked).tolist() == [[True, False, False, False, False, False, True, False]]
    assert unpacked.tolist() == [[0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "pattern, dtype, ratio",
    [("2:4", torch.bfloat16, 0.5625), ("2:4", torch.float32, 0.53125), ("1:4", torch.float16, 0.3125),
     ("4:8", torch.bfloat16, 0.5625), ("2:16", torch.bfloat16, 0.1875)],
)  # fmt: skip
def test_bytes(pattern: str, dtype: torch.dtype, ratio: float) -> None:
    nm = NMPattern.parse(pattern)
    weight = random_weight(nm, dtype)
    packed = PackedTensor.pack(weight, random_mask(nm, weight), nm)
    assert packed.dense_nbytes(weight.dtype) == weight.nbytes
    assert packed.nbytes / weight.nbytes == ratio == nm.density + 1 / (8 * weight.element_size())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shards", [2, 3, 6])
def test_slices_of_the_packed_are_the_packed_slices(pattern: NMPattern, shards: int) -> None:
    weight = random_weight(pattern, torch.bfloat16, rows=6, units=6)
    mask = random_mask(pattern, weight)
    packed = PackedTensor.pack(weight, mask, pattern)
    for shard in range(shards):
        rows = slice(6 // shards * shard, 6 // shards * (shard + 1))
        by_rows = PackedTensor.pack(weight[rows], mask[rows], pattern)
        assert bits(packed.values[rows]) == bits(by_rows.values)
        assert bits(packed.bitmask[rows]) == bits(by_rows.bitmask)

        def columns(width: int, shard: int = shard) -> slice:
            return slice(width // shards * shard, width // shards * (shard + 1))

        in_shard = columns(weight.shape[1])
        by_columns = PackedTensor.pack(weight[:, in_shard], mask[:, in_shard], pattern)
        assert bits(packed.values[:, columns(packed.values.shape[1])]) == bits(by_columns.values)
        assert bits(packed.bitmask[:, columns(packed.bitmask.shape[1])]) == bits(by_columns.bitmask)


def test_packing_copies() -> None:
    weight = torch.ones(2, 8)
    packed = PackedTensor.pack(weight, random_mask(TWO_FOUR, weight), TWO_FOUR)
    weight.fill_(7.0)
    assert packed.values.eq(1.0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_kept_weights_must_be_finite(value: float) -> None:
    weight = torch.ones(2, 8)
    mask = torch.tensor([True, True, False, False]).repeat(2, 2)
    weight[1, 2] = value
    assert torch.isfinite(PackedTensor.pack(weight, mask, TWO_FOUR).unpack()).all()
    weight[1, 4] = value
    with pytest.raises(NumericalError, match="up: kept weights hold NaN or infinity"):
        PackedTensor.pack(weight, mask, TWO_FOUR, "up")


def test_pack_refuses_what_the_format_cannot_hold() -> None:
    mask = torch.tensor([True, True, False, False]).repeat(2, 2)
    with pytest.raises(FormatError, match=r"up: dtype torch.float64"):
        PackedTensor.pack(torch.ones(2, 8).double(), mask, TWO_FOUR, "up")
    with pytest.raises(PatternError, match=r"up: weight \(2, 16\) and mask \(2, 8\) differ"):
        PackedTensor.pack(torch.ones(2, 16), mask, TWO_FOUR, "up")
    with pytest.raises(PatternError, match=r"up: in_features 12"):
        PackedTensor.pack(torch.ones(2, 12), torch.ones(2, 12) > 0, TWO_FOUR, "up")
    with pytest.raises(PatternError, match=r"up: row 0, columns 0..3 keep 4"):
        PackedTensor.pack(torch.ones(2, 8), torch.ones(2, 8) > 0, TWO_FOUR, "up")


@pytest.mark.parametrize(
    "values, bitmask, message",
    [
        (torch.ones(2, 4).double(), torch.full((2, 1), 0x33), "values torch.float64"),
        (torch.ones(2, 4), torch.full((2, 1), 0x33, dtype=torch.int32), "bitmask torch.int32"),
        (torch.ones(2, 5), torch.full((2, 1), 0x33), "do not match"),
        (torch.ones(3, 4), torch.full((2, 1), 0x33), "do not match"),
        (torch.ones(8), torch.full((2, 1), 0x33), "two non-empty matrices"),
        (torch.ones(2, 0), torch.full((2, 0), 0x33), "two non-empty matrices"),
        (torch.ones(2, 4), torch.full((2, 1), 0x37), "row 0, columns 0..3 keep 3"),
        (torch.ones(2, 4), torch.full((2, 1), 0x30), "row 0, columns 0..3 keep 0"),
    ],
)
def test_verify_refuses(values: Tensor, bitmask: Tensor, message: str) -> None:
    if bitmask.dtype == torch.int64:
        bitmask = bitmask.to(torch.uint8)
    with pytest.raises(FormatError, match=rf"up: .*{message}"):
        PackedTensor(values, bitmask, TWO_FOUR).verify("up")


def test_six_columns_do_not_fit_the_bytes_of_one_group_of_six() -> None:
    bitmask = pack_bits(torch.tensor([[True] * 3 + [False] * 5]))
    with pytest.raises(FormatError, match="do not match"):
        PackedTensor(torch.ones(1, 4), bitmask, NMPattern(3, 6)).verify()


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_quantised_pruned_weights_are_exactly_zero(kind: str, pattern: str) -> None:
    nm = NMPattern.parse(pattern)
    weight = random_weight(nm, torch.bfloat16, rows=6, units=4)
    packed = PackedTensor.pack(weight, random_mask(nm, weight), nm)
    codes = packed.quantised(kind)
    codes.verify("up")
    assert (codes.kind, packed.kind) == (kind, "float")
    assert codes.quantised(kind) is codes and packed.quantised("float") is packed
    assert codes.nbytes == packed.values.numel() + packed.bitmask.nbytes + 4 * 6
    dense = codes.unpack()
    assert dense.dtype == torch.float32
    assert bits(dense[~codes.mask()]) == bytes(4 * int((~codes.mask()).sum()))
    torch.testing.assert_close(dense, packed.unpack().float(), rtol=0.07, atol=float(packed.values.abs().max()) / 100)
    with pytest.raises(FormatError, match=f"values {kind} cannot become float"):
        codes.quantised("float")
    with pytest.raises(FormatError, match=f"values {kind} cannot become"):
        codes.quantised("int8" if kind == "fp8_e4m3" else "fp8_e4m3")


def test_the_scale_sees_kept_weights_only() -> None:
    weight = torch.tensor([[1.0, 100.0, 0.5, -100.0] * 2])
    mask = torch.tensor([[True, False, True, False] * 2])
    assert PackedTensor.pack(weight, mask, TWO_FOUR).quantised("int8").scale == pytest.approx(1 / 127)


def test_quantised_bytes_of_a_two_four_weight() -> None:
    packed = PackedTensor.pack(
        torch.randn(8, 4096).bfloat16(), torch.tensor([[True, True, False, False]]).repeat(8, 1024), TWO_FOUR
    )
    assert packed.quantised("int8").nbytes / packed.dense_nbytes(torch.bfloat16) == 0.3125 + 2 / 4096


@pytest.mark.parametrize("trained", [False, True])
def test_a_folded_correction_computes_the_same(trained: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 32, generator=generator), torch.randn(5, 32, generator=generator)
    packed = PackedTensor.pack(weight, random_mask(TWO_FOUR, weight), TWO_FOUR)
    pool = torch.randn(4, 32, generator=generator) if trained else None
    ones = torch.eye(4).repeat_interleave(8, dim=1) if pool is None else pool
    layer = StoredLayer(packed, Correction(torch.randn(6, 4, generator=generator), pool))
    expected = x @ packed.unpack().T + (x @ ones.T) @ layer.correction.out.T
    torch.testing.assert_close(x @ layer.dense(torch.float32).T, expected, rtol=1e-4, atol=1e-4)
    assert layer.nbytes == packed.nbytes + 6 * 4 * 4 + (4 * 32 * 4 if trained else 0)
    assert not layer.is_masked_only and StoredLayer(packed).is_masked_only
    layer.verify("up")


def test_the_sum_of_weight_and_correction_is_rounded_once() -> None:
    weight = torch.full((1, 8), 256.0).bfloat16()
    packed = PackedTensor.pack(weight, torch.tensor([[True, True, False, False] * 2]), TWO_FOUR)
    correction = Correction(torch.tensor([[1.001]]).bfloat16())
    assert StoredLayer(packed, correction).dense(torch.bfloat16)[0, :3].tolist() == [256.0, 256.0, 1.0]
    assert StoredLayer(packed, correction).dense(torch.float32)[0, :3].tolist() == [257.0, 257.0, 1.0]
    assert bits(StoredLayer(packed).dense(torch.bfloat16)) == bits(packed.unpack())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["out", "pool"])
def test_corrections_must_be_finite(value: float, where: str) -> None:
    weight = torch.ones(2, 8)
    packed = PackedTensor.pack(weight, random_mask(TWO_FOUR, weight), TWO_FOUR)
    tensors = {"out": torch.ones(2, 1), "pool": torch.ones(1, 8)}
    tensors[where][0, 0] = value
    with pytest.raises(FormatError, match="up: the correction holds NaN or infinity"):
        StoredLayer(packed, Correction(**tensors)).verify("up")
