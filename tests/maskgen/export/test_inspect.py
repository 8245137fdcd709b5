"""Inspection tells the truth: which layers follow a pattern, how many zeros, how many bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maskgen.core.companions import SETTINGS_FILE
from maskgen.core.correction import LowRankCorrection, PooledCorrection
from maskgen.core.errors import FormatError
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import decompress
from maskgen.export.inspect import InspectReport, inspect
from tests.directories import (
    COMPANIONS,
    HIDDEN,
    TARGETS,
    corrected_dir,
    dense_dir,
    edit_config,
    edit_tensors,
    read_all,
    sparse_dir,
)


def follows(report: InspectReport) -> dict[str, bool]:
    return {layer.name: layer.follows for layer in report.layers}


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    decompress(sparse_dir(tmp_path / "sparse"), tmp_path / "masked")
    return tmp_path / "masked"


def test_a_dense_model(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense", shard_bytes=3000)
    report = inspect(dense)
    assert (report.compressed, report.pattern, report.packed_layers) == (False, "2:4", [])
    assert sorted(follows(report)) == sorted([*TARGETS, "lm_head", "model.embed_tokens"])
    assert not any(follows(report).values())
    assert report.other_bytes == 2 * (5 * HIDDEN)
    assert report.other_bytes + sum(layer.stored_bytes for layer in report.layers) == sum(
        tensor.nbytes for tensor in read_all(dense).values()
    )
    assert all(layer.dense_bytes == layer.stored_bytes and layer.stored == "dense" for layer in report.layers)


def test_a_masked_dense_model_saves_nothing_but_follows(masked: Path) -> None:
    report = inspect(masked)
    assert not report.compressed
    for layer in report.layers:
        if layer.name in TARGETS:
            assert layer.follows
            assert layer.zeros == pytest.approx(0.5, abs=0.01)
            assert layer.stored_bytes == layer.out_features * layer.in_features * 2
        else:
            assert not layer.follows


def test_one_group_with_three_non_zeros_is_found(masked: Path) -> None:
    weight = read_all(masked)[TARGETS[2] + ".weight"]
    group = weight[17, 20:24]
    edit_tensors(
        masked, lambda tensors: tensors[TARGETS[2] + ".weight"][17, 20:24].copy_(torch.where(group == 0, 1e-8, group))
    )
    assert [name for name in TARGETS if not follows(inspect(masked))[name]] == [TARGETS[2]]


def test_fewer_non_zeros_and_minus_zeros_still_follow(masked: Path) -> None:
    edit_tensors(masked, lambda tensors: tensors[TARGETS[0] + ".weight"][3].fill_(-0.0))
    layer = next(layer for layer in inspect(masked).layers if layer.name == TARGETS[0])
    assert layer.follows
    assert layer.zeros == pytest.approx((0.5 * 31 + 1) / 32, abs=0.01)


def test_the_pattern_is_the_callers_for_dense_directories(masked: Path) -> None:
    assert follows(inspect(masked, NMPattern(4, 8)))[TARGETS[0]]
    assert follows(inspect(masked, NMPattern(3, 4)))[TARGETS[0]]
    assert not follows(inspect(masked, NMPattern(1, 4)))[TARGETS[0]]
    assert not follows(inspect(masked, NMPattern(2, 6)))[TARGETS[0]]
    assert inspect(masked, NMPattern(4, 8)).pattern == "4:8"


def test_a_sparse_checkpoint(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse")
    report = inspect(sparse, NMPattern(1, 4))
    assert (report.compressed, report.pattern) == (True, "2:4")
    assert [layer.name for layer in report.packed_layers] == list(TARGETS)
    for layer in report.packed_layers:
        assert layer.follows
        assert layer.stored_bytes / layer.dense_bytes == 0.5625
        assert layer.zeros == pytest.approx(0.5, abs=0.01)
    assert sorted(follows(report)) == sorted([*TARGETS, "lm_head", "model.embed_tokens"])
    assert report.other_bytes + sum(layer.stored_bytes for layer in report.layers) == sum(
        tensor.nbytes for tensor in read_all(sparse).values()
    )


def test_low_rank_corrections_are_counted(tmp_path: Path) -> None:
    report = inspect(corrected_dir(tmp_path / "sparse", "float", LowRankCorrection(5)))
    assert report.correction == {"kind": "lowrank", "rank": 5}
    assert all(
        layer.correction_bytes == 2 * 5 * (layer.out_features + layer.in_features) for layer in report.packed_layers
    )
    assert all(
        layer.stored_bytes == 0.5625 * layer.dense_bytes + layer.correction_bytes for layer in report.packed_layers
    )


def test_codes_and_corrections_are_counted(tmp_path: Path) -> None:
    sparse = corrected_dir(tmp_path / "sparse", "int8", PooledCorrection(8, "trained"))
    report = inspect(sparse)
    assert report.values == "int8"
    for layer in report.packed_layers:
        columns = layer.in_features // 8
        assert layer.dense_bytes == 2 * layer.out_features * layer.in_features
        assert layer.correction_bytes == 2 * columns * (layer.out_features + layer.in_features)
        packed_bytes = layer.stored_bytes - layer.correction_bytes
        assert packed_bytes == 0.3125 * layer.dense_bytes + 4 * layer.out_features
        assert layer.follows and layer.zeros == pytest.approx(0.5, abs=0.02)
    assert report.other_bytes + sum(layer.stored_bytes for layer in report.layers) == sum(
        tensor.nbytes for tensor in read_all(sparse).values()
    )


def test_sparse_and_masked_dense_report_the_same_zeros(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse")
    edit_tensors(sparse, lambda tensors: tensors[TARGETS[0] + ".values"][:5].zero_())
    edit_config(sparse, version_2)
    decompress(sparse, tmp_path / "masked")
    packed, dense = (
        {layer.name: layer.zeros for layer in inspect(tmp_path / name).layers} for name in ("sparse", "masked")
    )
    assert packed == pytest.approx(dense)
    assert packed[TARGETS[0]] > 0.55


def test_dtypes_that_are_not_ours_and_tensors_that_are_no_matrices(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    edit_tensors(
        dense,
        lambda tensors: tensors.update(
            {
                "fp8.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn),
                "ints.weight": torch.ones(4, 8, dtype=torch.int8),
                "scalar.weight": torch.tensor(1.0),
                "conv.weight": torch.ones(2, 2, 2),
            }
        ),
    )
    report = inspect(dense)
    assert follows(report)["fp8"]
    assert not follows(report)["ints"]
    assert report.other_bytes == 2 * (5 * HIDDEN) + 4 + 32


def test_the_report_is_json(tmp_path: Path) -> None:
    report = inspect(sparse_dir(tmp_path / "sparse"))
    again = json.loads(json.dumps(report.to_dict()))
    assert again["compressed"] is True
    assert again["layers"][0]["stored"] == "packed"


def test_damage_is_an_error_not_a_report(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse")
    edit_tensors(sparse, lambda tensors: tensors[TARGETS[0] + ".bitmask"][0, 0].fill_(0xFF))
    with pytest.raises(FormatError, match=rf"sparse: {TARGETS[0]}: row 0, columns 0\.\.3 keep 4"):
        inspect(sparse)
    with pytest.raises(FormatError, match="nothing: no such directory"):
        inspect(tmp_path / "nothing")


def test_digests_are_compared(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse", shard_bytes=5000)
    assert inspect(sparse).digests == len(list(sparse.glob("*.safetensors")))
    shard = sparse / "model-00001-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FormatError, match=rf"{shard.name}: digest"):
        inspect(sparse)
    edit_config(sparse, version_2)
    assert inspect(sparse).digests == 0


def test_settings_are_compared(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse")
    assert inspect(sparse).settings == 1 + len(COMPANIONS)
    edit_config(sparse, lambda config: config.update(rms_norm_eps=1e5))
    with pytest.raises(FormatError, match=r"config.json: rms_norm_eps is 100000.0, and was 1e-06"):
        inspect(sparse)
    (sparse / SETTINGS_FILE).unlink()
    assert inspect(sparse).settings == 0


def version_2(config: dict[str, Any]) -> None:
    del config["quantization_config"]["shards"]
    config["quantization_config"]["format_version"] = 2
