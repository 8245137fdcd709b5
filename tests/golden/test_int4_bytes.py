"""The third example of `proto/checkpoint.md`, byte for byte: int4 values, which are version 4."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.config import SparseConfig
from tests.directories import bits, edit_config, refused
from tests.golden.test_checkpoint_bytes import (
    BASE_DIGEST,
    BITMASK_HEX,
    DOCUMENT,
    MASK_DIGEST,
    NAME,
    PATTERN,
    RECIPE_DIGEST,
)

SCALE_HEX = "0000003f0000803e"
VALUES_HEX = "43e660c8"
WEIGHT = [[1.5, 0, 0, 2.0, 3.0, 0, -1.0, 0], [0, 0, 0, 1.5, 0, -2.0, 0, -1.0]]
SHARD = {"model.safetensors": "sha256:" + "0" * 64}


def manifest(group: int | None) -> SparseConfig:
    digests = (MASK_DIGEST, RECIPE_DIGEST)
    return SparseConfig(PATTERN, (NAME,), (), *digests, "example", BASE_DIGEST, "int4", shards=SHARD, group=group)


def write_by_hand(path: Path, group: int | None) -> Path:
    """As a stranger's writer would, from the document."""
    shapes = {"scale": [2] if group is None else [2, 1], "values": [2, 2], "bitmask": [2, 1]}
    header, data = {}, b""
    for suffix, dtype, text in (
        ("scale", "F32", SCALE_HEX),
        ("values", "U8", VALUES_HEX),
        ("bitmask", "U8", BITMASK_HEX),
    ):
        offsets = [len(data), len(data) + len(text) // 2]
        header[f"{NAME}.{suffix}"] = {"dtype": dtype, "shape": shapes[suffix], "data_offsets": offsets}
        data += bytes.fromhex(text)
    head = json.dumps(header).encode()
    path.mkdir()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    config = {"dtype": "bfloat16", "quantization_config": manifest(group).to_dict()}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("group", [64, 128, None])
def test_bytes_written_by_hand_are_read(group: int | None, tmp_path: Path) -> None:
    checkpoint = SparseCheckpoint.open(write_by_hand(tmp_path / "hand", group))
    assert checkpoint.config.group == group
    layer = checkpoint.layer(NAME)
    assert layer.packed.unpack().tolist() == WEIGHT
    assert bits(layer.packed.values).hex() == VALUES_HEX
    assert layer.dense(checkpoint.weight_dtype(NAME)).dtype is torch.bfloat16


def test_the_manifest_names_version_and_group() -> None:
    assert manifest(64).to_dict()["format_version"] == 4
    assert [manifest(group).to_dict()["group"] for group in (64, 128, None)] == [64, 128, "row"]
    for group in (64, 128, None):
        assert SparseConfig.from_dict(manifest(group).to_dict()) == manifest(group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, r"unknown keys \['group'\]"),
        ({"values": "int8"}, "values 'int8' in format_version 4; int4 values, and no others, have version 4"),
        ({"values": ["int4"]}, r"values \['int4'\] in format_version 4"),
        ({"group": 32}, "a group of 32 for int4 values, expected 64, 128 or 'row'"),
        ({"group": True}, "a group of True for int4 values"),
        ({"group": 64.0}, r"a group of 64\.0 for int4 values"),
        ({"group": "64"}, "a group of '64' for int4 values"),
        ({"group": None}, "a group of None for int4 values"),
        ({"group": 10**30}, "a group of 1000.* for int4 values"),
        ({"shards": None}, "shards None, expected an object"),
    ],
)
def test_manifests_that_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write_by_hand(tmp_path / "hand", 64)
    edit_config(path, lambda config: config["quantization_config"].update(change))
    refused(SparseCheckpoint.open, path, message)


def test_int4_without_a_group_or_in_an_older_version_is_refused(tmp_path: Path) -> None:
    path = write_by_hand(tmp_path / "hand", 64)
    edit_config(path, lambda config: config["quantization_config"].pop("group"))
    refused(SparseCheckpoint.open, path, r"missing keys \['group'\]")
    edit_config(path, lambda config: config["quantization_config"].update(format_version=3))
    refused(
        SparseCheckpoint.open, path, "values 'int4' in format_version 3; int4 values, and no others, have version 4"
    )


def test_the_document_has_these_bytes() -> None:
    for text in (SCALE_HEX, VALUES_HEX, '"values": "int4", "group": 64'):
        assert text in DOCUMENT
