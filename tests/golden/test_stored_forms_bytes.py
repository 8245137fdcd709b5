"""The second example of `proto/checkpoint.md`, byte for byte: codes with scales, and corrections."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.config import SparseConfig
from maskgen.core.correction import PooledCorrection
from maskgen.core.packed import Correction, PackedTensor, StoredLayer
from maskgen.core.writer import CheckpointWriter
from maskgen.export.compress import compress, decompress
from tests.directories import bits, read_all
from tests.golden.test_checkpoint_bytes import (
    BASE_DIGEST,
    BITMASK_HEX,
    DOCUMENT,
    MASK_DIGEST,
    NAME,
    PATTERN,
    RECIPE_DIGEST,
    SECTION,
    WEIGHT,
    masks,
)

S = [[0.5, -0.25], [1.0, 0.0]]
X = [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0]]
FORM_JSON = '"values": "%s", "correction": {"kind": "pooled", "segment": 4, "pool": "%s"}'


@dataclass(frozen=True)
class Example:
    """One directory: its tensors in hexadecimal by suffix in the file's order, and what they stand for."""

    values: str
    pool: str
    dtypes: tuple[str, ...]
    tensors: dict[str, str]
    weight: str
    folded: str
    sha256: str


EXAMPLES = (
    Example(
        "int8",
        "trained",
        ("F32", "BF16", "BF16", "I8", "U8"),
        {
            "scale": "0683c13c0402013c",
            "correction_out": "003f80be803f0000",
            "correction_pool": "803f803f803f803f000000000000000000000000003f0000803f803f803f803f",
            "values": "4055d67f007f5f5f",
            "bitmask": BITMASK_HEX,
        },
        "0683c13f000000000000000002810040f8fb7dbf0000000000004040"
        "000000000000000000000000000000000000803f00000000fe7e3f3f00000000fe7e3f3f",
        "0140003fc03e21409fbf80be304080be803f803f803f004000003f3f00003f3f",
        "35807d4820c2aa341617887cd5498ea9cc44945d63b68f8a7a801b3cd5acad20",
    ),
    Example(
        "fp8_e4m3",
        "fixed",
        ("F32", "BF16", "F8_E4M3", "U8"),
        {
            "scale": "b76ddb3b2549123b",
            "correction_out": "003f80be803f0000",
            "values": "7679f17e007e7a7a",
            "bitmask": BITMASK_HEX,
        },
        "0000c03f00000000000000006edbf63f6edb76bf0000000000004040"
        "000000000000000000000000000000000000803f000000006edb363f000000006edb363f",
        "0040003f003f1b409bbf80be304080be803f803f803f00400000373f0000373f",
        "a2974991e03d42018b478533e710e1302972735d954939f0c6d3753ec16991e4",
    ),
)


def bfloat16(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bfloat16)


def manifest(example: Example) -> SparseConfig:
    form, digests = PooledCorrection(4, example.pool), (MASK_DIGEST, RECIPE_DIGEST)
    return SparseConfig(PATTERN, (NAME,), (), *digests, "example", BASE_DIGEST, example.values, form)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.values)
def test_what_we_write(example: Example, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "example", {"dtype": "bfloat16"}) as writer:
        writer.add(NAME + ".weight", bfloat16(WEIGHT))
    correction = Correction(bfloat16(S), bfloat16(X) if example.pool == "trained" else None)

    def pack(name: str, weight: Tensor) -> StoredLayer:
        return StoredLayer(PackedTensor.pack(weight, masks().mask(name), PATTERN), correction)

    compress(tmp_path / "example", manifest(example), pack, tmp_path / "sparse")
    data = (tmp_path / "sparse" / "model.safetensors").read_bytes()
    assert data.hex().endswith("".join(example.tensors.values()))
    assert hashlib.sha256(data).hexdigest() == example.sha256
    section = json.loads((tmp_path / "sparse" / "config.json").read_text())["quantization_config"]
    form = json.loads("{" + FORM_JSON % (example.values, example.pool) + "}")
    assert section == {**SECTION, **form, "shards": {"model.safetensors": f"sha256:{example.sha256}"}}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.values)
def test_bytes_written_by_hand_are_read(example: Example, tmp_path: Path) -> None:
    """A stranger's writer, which puts the tensors in the document's order."""
    shapes = {"scale": [2], "correction_out": [2, 2], "correction_pool": [2, 8], "values": [2, 4], "bitmask": [2, 1]}
    header, data = {}, b""
    for (suffix, text), dtype in zip(example.tensors.items(), example.dtypes, strict=True):
        offsets = [len(data), len(data) + len(text) // 2]
        header[f"{NAME}.{suffix}"] = {"dtype": dtype, "shape": shapes[suffix], "data_offsets": offsets}
        data += bytes.fromhex(text)
    head = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    config = {"dtype": "bfloat16", "quantization_config": manifest(example).to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = SparseCheckpoint.open(tmp_path).layer(NAME)
    assert bits(layer.packed.unpack()).hex() == example.weight
    decompress(tmp_path, tmp_path / "dense")
    assert bits(read_all(tmp_path / "dense")[NAME + ".weight"]).hex() == example.folded


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.values)
def test_the_document_says_the_same(example: Example) -> None:
    texts = [*example.tensors.values(), example.weight, example.folded, example.sha256]
    for text in [*texts, FORM_JSON % (example.values, example.pool)]:
        assert text in DOCUMENT
