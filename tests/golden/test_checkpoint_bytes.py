"""The worked example of `proto/checkpoint.md`, byte for byte: code, this file and the document say the same.

If a test here fails, either the change is a mistake or the format has a new version.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import digest_weights
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.writer import CheckpointWriter
from maskgen.export.compress import compress_masks, decompress
from tests.directories import bits, read_all

DOCUMENT = (Path(__file__).parents[2] / "proto" / "checkpoint.md").read_text("utf-8")
NAME = "model.layers.0.mlp.up_proj"
PATTERN = NMPattern(2, 4)

WEIGHT = [[1.5, -0.25, 0.0, 2.0, -1.0, 0.5, 3.0, -0.125], [0.0, 0.0, 0.0, 1.0, -0.0, 0.75, -0.5, 0.75]]
MASK = [[1, 0, 0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1, 0, 1]]
WEIGHT_HEX = "c03f80be0000004080bf003f404000be000000000000803f0080403f00bf403f"
VALUES_HEX = "c03f004080bf40400000803f403f403f"
BITMASK_HEX = "59a9"
UNPACKED_HEX = "c03f00000000004080bf000040400000000000000000803f0000403f0000403f"
SHARD_HEADER = (
    '{"__metadata__":{"format":"pt"},'
    '"model.layers.0.mlp.up_proj.values":{"dtype":"BF16","shape":[2,4],"data_offsets":[0,16]},'
    '"model.layers.0.mlp.up_proj.bitmask":{"dtype":"U8","shape":[2,1],"data_offsets":[16,18]}}'
)
SHARD_LENGTH_HEX = "d800000000000000"
SHARD_SHA256 = "3d3dd44166703a65a180ce9da666c18a5cd55c34cae44735bcca57bd8013a609"
BASE_SHA256 = "28c1666da2b7233cdce0be287d28c06457412d469192336985b146b45fc7815e"
BASE_DIGEST = "sha256:400719d339e1e9b6a5d31f3bb0a290e7018d15207c11a804099e8cc44e26f01e"
MASK_DIGEST = "sha256:cbe9fad3c8e0b86e95c28fc752ef5af7ebfaca05fc4672a28f4f698a1a9af2ec"
RECIPE_DIGEST = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
SECTION = {
    "quant_method": "sparse_nm",
    "format_version": 3,
    "pattern": "2:4",
    "values": "float",
    "correction": None,
    "targets": [NAME],
    "ignored": [],
    "mask_digest": MASK_DIGEST,
    "recipe_digest": RECIPE_DIGEST,
    "base_model": {"name": "example", "digest": BASE_DIGEST},
    "shards": {"model.safetensors": f"sha256:{SHARD_SHA256}"},
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    with CheckpointWriter(tmp_path / "example", {}) as writer:
        writer.add(NAME + ".weight", torch.tensor(WEIGHT, dtype=torch.bfloat16))
    return tmp_path / "example"


def masks(base_digest: str = BASE_DIGEST) -> MaskSet:
    return MaskSet.from_masks(PATTERN, {NAME: torch.tensor(MASK) > 0}, base_digest, RECIPE_DIGEST)


def test_weight_mask_values_and_bitmask() -> None:
    weight = torch.tensor(WEIGHT, dtype=torch.bfloat16)
    mask = PATTERN.mask_from_scores(weight.float().abs())
    assert bits(weight).hex() == WEIGHT_HEX
    assert mask.int().tolist() == MASK
    packed = PackedTensor.pack(weight, mask, PATTERN)
    assert bits(packed.values).hex() == VALUES_HEX
    assert bits(packed.bitmask).hex() == BITMASK_HEX
    assert bits(packed.unpack()).hex() == UNPACKED_HEX


def test_shard_and_manifest(dense: Path, tmp_path: Path) -> None:
    assert hashlib.sha256((dense / "model.safetensors").read_bytes()).hexdigest() == BASE_SHA256
    compress_masks(dense, masks(), tmp_path / "sparse")
    data = (tmp_path / "sparse" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", bytes.fromhex(SHARD_LENGTH_HEX))[0]
    assert data[:8].hex() == SHARD_LENGTH_HEX
    assert data[8 : 8 + length].decode() == SHARD_HEADER.ljust(length)
    assert data[8 + length :].hex() == VALUES_HEX + BITMASK_HEX
    assert hashlib.sha256(data).hexdigest() == SHARD_SHA256
    assert json.loads((tmp_path / "sparse" / "config.json").read_text()) == {"quantization_config": SECTION}


def test_bytes_written_by_hand_are_read(tmp_path: Path) -> None:
    """A stranger's writer: nothing of ours makes these files."""
    header = SHARD_HEADER.encode() + 6 * b" "
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": SECTION}))
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes.fromhex(VALUES_HEX + BITMASK_HEX)
    )
    checkpoint = SparseCheckpoint.open(tmp_path)
    checkpoint.verify_digests()
    assert bits(checkpoint.packed(NAME).unpack()).hex() == UNPACKED_HEX
    decompress(tmp_path, tmp_path / "dense")
    assert bits(read_all(tmp_path / "dense")[NAME + ".weight"]).hex() == UNPACKED_HEX


def test_version_2_is_read_and_has_no_digests(dense: Path, tmp_path: Path) -> None:
    compress_masks(dense, masks(), tmp_path / "sparse")
    section = {key: value for key, value in SECTION.items() if key != "shards"} | {"format_version": 2}
    (tmp_path / "sparse" / "config.json").write_text(json.dumps({"quantization_config": section}))
    checkpoint = SparseCheckpoint.open(tmp_path / "sparse")
    assert checkpoint.config.to_dict() == section
    assert bits(checkpoint.packed(NAME).unpack()).hex() == UNPACKED_HEX
    with pytest.raises(FormatError, match="sparse: no digests: it was written in an earlier version"):
        checkpoint.verify_digests()


def test_digests_by_hand(dense: Path) -> None:
    mask_recipe = f"sparse_nm.masks 2:4\n{NAME} torch.uint8 (2, 1)\n".encode() + bytes.fromhex(BITMASK_HEX)
    assert "sha256:" + hashlib.sha256(mask_recipe).hexdigest() == MASK_DIGEST == masks().digest()
    base_recipe = f"model.safetensors {BASE_SHA256}\n".encode()
    assert "sha256:" + hashlib.sha256(base_recipe).hexdigest() == BASE_DIGEST == digest_weights(dense)
    assert "sha256:" + hashlib.sha256(b"{}").hexdigest() == RECIPE_DIGEST


@pytest.mark.parametrize(
    "text",
    [WEIGHT_HEX, VALUES_HEX, BITMASK_HEX, UNPACKED_HEX, SHARD_HEADER, SHARD_LENGTH_HEX, SHARD_SHA256, BASE_SHA256,
     BASE_DIGEST, MASK_DIGEST, RECIPE_DIGEST, json.dumps(SECTION, indent=2)],
)  # fmt: skip
def test_the_document_says_the_same(text: str) -> None:
    assert text in DOCUMENT
