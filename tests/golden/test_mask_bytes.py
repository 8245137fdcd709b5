"""The mask file, byte for byte, against what section 7 of `proto/checkpoint.md` works out by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from maskgen.core.digest import digest_bytes
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from tests.architecture.source import ROOT

DOCUMENT = (ROOT / "proto" / "checkpoint.md").read_text("utf-8")
NAME = "model.layers.0.mlp.up_proj"
MASK = [[1, 0, 0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1, 0, 1]]
SHAPE_HEX, DIGITS_HEX, BITMASK_HEX = "02000000000000000800000000000000", "5004", "59a9"
BASE, RECIPE = digest_bytes(b"base"), digest_bytes(b"recipe")
MASK_DIGEST = digest_bytes(f"sparse_nm.masks 2:4\n{NAME} torch.uint8 (2, 1)\n".encode() + bytes.fromhex(BITMASK_HEX))
METADATA = {
    "format": "sparse_nm.masks",
    "format_version": "2",
    "encoding": "pattern-digits",
    "pattern": "2:4",
    "mask_digest": MASK_DIGEST,
    "base_digest": BASE,
    "recipe_digest": RECIPE,
}


def test_written_as_documented(tmp_path: Path) -> None:
    """The order of metadata keys is not fixed, so the header is compared by content."""
    masks = MaskSet.from_masks(NMPattern(2, 4), {NAME: torch.tensor(MASK) > 0}, BASE, RECIPE)
    masks.save(tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    header_bytes = struct.unpack("<Q", data[:8])[0]
    assert json.loads(data[8 : 8 + header_bytes]) == {
        "__metadata__": METADATA,
        NAME + ".shape": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        NAME + ".digits": {"dtype": "U8", "shape": [2], "data_offsets": [16, 18]},
    }
    assert data[8 + header_bytes :].hex() == SHAPE_HEX + DIGITS_HEX


def test_bytes_written_by_hand_are_read(tmp_path: Path) -> None:
    """A stranger's writer: nothing of ours makes this file."""
    header = {
        "__metadata__": METADATA,
        NAME + ".digits": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        NAME + ".shape": {"dtype": "I64", "shape": [2], "data_offsets": [2, 18]},
    }
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes.fromhex(DIGITS_HEX + SHAPE_HEX)
    (tmp_path / "m.safetensors").write_bytes(data)
    masks = MaskSet.load(tmp_path / "m.safetensors")
    assert masks.mask(NAME).int().tolist() == MASK
    assert masks.digest() == MASK_DIGEST


def test_patterns_that_stay_bits(tmp_path: Path) -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]]) > 0
    MaskSet.from_masks(NMPattern(4, 8), {NAME: mask}, BASE, RECIPE).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert (file.metadata()["encoding"], list(file.keys())) == ("bits", [NAME + ".bitmask"])
        assert file.get_tensor(NAME + ".bitmask").tolist() == [[0b10010110]]


@pytest.mark.parametrize("text", [SHAPE_HEX, DIGITS_HEX, *METADATA, "sparse_nm.masks", "pattern-digits", "`bits`"])
def test_the_document_says_the_same(text: str) -> None:
    assert text in DOCUMENT
