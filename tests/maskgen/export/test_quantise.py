"""Sparse checkpoint -> the same with 8-bit values: same masks, same everything else, and bytes as promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.correction import PooledCorrection
from maskgen.core.errors import FormatError, OutputExistsError
from maskgen.core.packed import PackedTensor
from maskgen.export.compress import compress_masks, decompress
from maskgen.export.quantise import quantise
from tests.directories import COMPANIONS, TARGETS, bits, corrected_dir, dense_dir, magnitude_masks, read_all, sparse_dir

KINDS = ("int8", "fp8_e4m3", "int4")
FORM = PooledCorrection(8, "trained")


@pytest.mark.parametrize("kind", KINDS)
def test_only_values_change(tmp_path: Path, kind: str) -> None:
    corrected_dir(tmp_path / "float", "float", FORM)
    report = quantise(tmp_path / "float", tmp_path / "codes", kind, shard_bytes=3000)
    before, after = SparseCheckpoint.open(tmp_path / "float"), SparseCheckpoint.open(tmp_path / "codes")
    assert after.config == replace(before.config, values=kind, shards=after.config.shards)
    after.verify_digests()
    assert len({header.path for header in after.headers.values()}) > 2
    for name in before.headers:
        if not name.endswith(".values"):
            assert bits(after.tensor(name)) == bits(before.tensor(name)), name
    for module in TARGETS:
        expected, codes = before.packed(module).quantised(kind), after.packed(module)
        assert codes.scale is not None and expected.scale is not None
        assert bits(codes.values.float()) == bits(expected.values.float()) and torch.equal(codes.scale, expected.scale)
    assert report.packed_target_bytes == sum(after.layer(name).nbytes for name in TARGETS)
    assert all((tmp_path / "codes" / name).is_file() for name in COMPANIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_one(tmp_path: Path, kind: str) -> None:
    """`compress --values` and quantising afterwards write the same."""
    dense = dense_dir(tmp_path / "dense")
    compress_masks(dense, magnitude_masks(dense), tmp_path / "float", ("lm_head",))
    two = quantise(tmp_path / "float", tmp_path / "two", kind)
    one = compress_masks(dense, magnitude_masks(dense), tmp_path / "one", ("lm_head",), values=kind)
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert one == two
    weights = 32 * 32 + 2 * 64 * 32
    rows = 32 + 32 + 64
    assert one.ratio == (0.1875 if kind == "int4" else 0.3125) + 4 * rows / (2 * weights)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_decompressed_codes_have_the_dtype_of_the_config(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    corrected_dir(tmp_path / "codes", "int8", torch_dtype=dtype)
    decompress(tmp_path / "codes", tmp_path / "dense")
    packed = SparseCheckpoint.open(tmp_path / "codes").packed(TARGETS[0])
    dense = read_all(tmp_path / "dense")[TARGETS[0] + ".weight"]
    assert dense.dtype == expected
    assert bits(dense) == bits(packed.unpack().to(expected))
    assert (dense == 0)[~packed.mask()].all()


@pytest.mark.parametrize("dtype", [None, "float64", ["bfloat16"], 16])
def test_a_config_that_names_no_dtype_of_ours_means_float32(tmp_path: Path, dtype: object) -> None:
    corrected_dir(tmp_path / "codes", "fp8_e4m3", torch_dtype=dtype)
    decompress(tmp_path / "codes", tmp_path / "dense")
    dense = read_all(tmp_path / "dense")[TARGETS[0] + ".weight"]
    assert bits(dense) == bits(SparseCheckpoint.open(tmp_path / "codes").packed(TARGETS[0]).unpack())


@pytest.mark.parametrize("kind", [*KINDS, "float"])
def test_values_are_rounded_once(tmp_path: Path, kind: str) -> None:
    corrected_dir(tmp_path / "codes", "int8")
    with pytest.raises(
        FormatError, match=f"values int8 cannot become '{kind}'; quantise float values to int8 or fp8_e4m3 or int4"
    ):
        quantise(tmp_path / "codes", tmp_path / "again", kind)
    assert not (tmp_path / "again").exists()


def test_refusals(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "float")
    with pytest.raises(FormatError, match="values float cannot become 'float'"):
        quantise(sparse, tmp_path / "out", "float")
    with pytest.raises(FormatError, match="values 'int3', expected one of"):
        quantise(sparse, tmp_path / "out", "int3")
    for values, group in (("int8", 64), ("int4", 32)):
        with pytest.raises(FormatError, match=f"a group of {group} for {values} values, expected 64, 128 or 'row'"):
            quantise(sparse, tmp_path / "out", values, group)
    with pytest.raises(OutputExistsError):
        quantise(sparse, sparse, "int8")
    with pytest.raises(FormatError, match="a dense model"):
        quantise(tmp_path / "float-dense", tmp_path / "out", "int8")


def test_every_layer_is_quantised_once_and_written_when_its_shard_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, seen = sparse_dir(tmp_path / "float"), list[int]()
    really = PackedTensor.quantised
    monkeypatch.setattr(PackedTensor, "quantised", lambda packed, *form: (seen.append(1), really(packed, *form))[1])
    quantise(sparse, tmp_path / "out", "int8", shard_bytes=1)
    assert len(seen) == len(TARGETS)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(SparseCheckpoint.open(tmp_path / "out").headers)
