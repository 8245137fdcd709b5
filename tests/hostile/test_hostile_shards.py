"""Damaged and hostile safetensors files inside a sparse checkpoint: one error each, before anything is used."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from maskgen.core.checkpoint import INDEX_NAME, SparseCheckpoint
from maskgen.core.config import SparseConfig
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.core.packed import PackedTensor
from maskgen.core.writer import CheckpointWriter
from tests.directories import (
    RECIPE,
    TARGETS,
    TWO_FOUR,
    bits,
    edit_tensors,
    raw_safetensors,
    refused,
    sparse_dir,
)

UP = TARGETS[1]
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_dir(tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture
def victim(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "victim"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One packed 4 x 16 weight and nothing else, so that its file can be damaged byte by byte."""
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = TWO_FOUR.mask_from_scores(weight.float().abs())
    packed = PackedTensor.pack(weight, mask, TWO_FOUR)
    digest = MaskSet.from_masks(TWO_FOUR, {NAME: mask}, RECIPE, RECIPE).digest()
    config = SparseConfig(TWO_FOUR, (NAME,), (), digest, RECIPE, "small", RECIPE)
    with CheckpointWriter(tmp_path / "small", {"quantization_config": config.to_dict()}) as writer:
        writer.add(NAME + ".values", packed.values)
        writer.add(NAME + ".bitmask", packed.bitmask)
    return tmp_path / "small"


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + header_bytes]), data[8 + header_bytes :]


def test_truncated_anywhere(small: Path) -> None:
    file = small / "model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"model\.safetensors: not a valid safetensors file"):
            SparseCheckpoint.open(small)


def test_truncated_or_longer_large_file(victim: Path) -> None:
    file = victim / "model.safetensors"
    whole = file.read_bytes()
    offsets = random.Random(0)
    for length in [*(offsets.randrange(len(whole)) for _ in range(40)), len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(SparseCheckpoint.open, victim, "not a valid safetensors file")
    for extra in (b"\0", b"x" * 4096):
        file.write_bytes(whole + extra)
        refused(SparseCheckpoint.open, victim, "not a valid safetensors file")


def test_any_flipped_bit_is_refused_or_harmless(small: Path) -> None:
    """Values carry no checksum; everything else does: a flip in the header or the mask may not change the weight."""
    file = small / "model.safetensors"
    whole = file.read_bytes()
    weight = SparseCheckpoint.open(small).packed(NAME)
    values_start = len(whole) - weight.bitmask.nbytes - weight.values.nbytes
    assert whole[values_start:] == bits(weight.values) + bits(weight.bitmask)
    survivors = 0
    for position in [*range(values_start), *range(values_start + weight.values.nbytes, len(whole))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position * 5 + 3) % 8
        file.write_bytes(damaged)
        try:
            again = SparseCheckpoint.open(small).packed(NAME)
        except FormatError:
            continue
        survivors += 1
        assert position < values_start, "a flipped mask bit was not noticed"
        assert (again.values.dtype, again.values.shape) == (weight.values.dtype, weight.values.shape)
        assert bits(again.values) + bits(again.bitmask) == bits(weight.values) + bits(weight.bitmask)
    assert survivors < 30


@pytest.mark.parametrize("header_bytes", [2**63, 2**64 - 1, 2**40, 2**31, 100_000_001, 1, 0])
def test_absurd_header_length(victim: Path, header_bytes: int) -> None:
    file = victim / "model.safetensors"
    file.write_bytes(struct.pack("<Q", header_bytes) + file.read_bytes()[8:])
    refused(SparseCheckpoint.open, victim, r"model\.safetensors: not a valid safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff" * 16,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1099511627776,1099511627776],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]}}',
        b'{"a":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}',
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}',
        b'{"__metadata__":{"format":["pt"]}}',
        b'{"' + b"a" * 5000 + b'":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}',
        b'{"\\u202e":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}',
        b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    ],
)
def test_headers_that_lie(victim: Path, header: bytes) -> None:
    raw_safetensors(victim / "model.safetensors", header, bytes(16))
    refused(SparseCheckpoint.open, victim, r"model\.safetensors: not a valid safetensors file")


def test_an_empty_header(victim: Path) -> None:
    raw_safetensors(victim / "model.safetensors", b"{}")
    refused(SparseCheckpoint.open, victim, r"model\.safetensors: holds no tensors")


def test_a_tensor_named_twice(small: Path) -> None:
    """safetensors takes the last of two; another reader may take the first."""
    header, data = header_of(small / "model.safetensors")
    text = json.dumps(header)
    key = json.dumps(NAME + ".bitmask")
    doubled = text[:-1] + f", {key}: {json.dumps(header[NAME + '.bitmask'])}}}"
    raw_safetensors(small / "model.safetensors", doubled.encode(), data)
    refused(SparseCheckpoint.open, small, r"model\.safetensors: not valid JSON: duplicate key 'model\.layers\.0\.mlp")


@pytest.mark.parametrize("shape", [[0], [0, 10**12], [10**12, 0], [0, 2**63]])
def test_an_empty_tensor_cannot_vouch_for_a_size(small: Path, shape: list[int]) -> None:
    header, data = header_of(small / "model.safetensors")
    header["a.weight"] = {"dtype": "U8", "shape": shape, "data_offsets": [len(data), len(data)]}
    raw_safetensors(small / "model.safetensors", json.dumps(header).encode(), data)
    refused(SparseCheckpoint.open, small, r"tensor 'a\.weight' of shape .* is empty")


def bitmask_byte(value: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[UP + ".bitmask"][5].__setitem__(1, value)


@pytest.mark.parametrize(
    "edit, message",
    [
        (bitmask_byte(0b0011_0111), rf"{UP}: row 5, columns 8\.\.11 keep 3 weights, expected 2 \(1 of"),
        (bitmask_byte(0b0011_0000), rf"{UP}: row 5, columns 8\.\.11 keep 0 weights"),
        (bitmask_byte(0b1111_0011), rf"{UP}: row 5, columns 12\.\.15 keep 4 weights"),
        (bitmask_byte(0b0111_0001), rf"{UP}: row 5, columns 8\.\.11 keep 1 weights"),
        (lambda t: t.pop(UP + ".bitmask"), rf"target {UP}: expected exactly .*, found \['{UP}\.values'\]"),
        (lambda t: t.pop(UP + ".values"), rf"target {UP}: expected exactly .*, found \['{UP}\.bitmask'\]"),
        (lambda t: t.update({UP + ".weight": torch.ones(64, 32)}), rf"target {UP}: .*'{UP}\.weight'\]"),
        (lambda t: t.update({"x.values": torch.ones(3)}), r"tensor 'x\.values' belongs to no target"),
        (lambda t: t.update({"x.bitmask": torch.ones(3)}), r"tensor 'x\.bitmask' belongs to no target"),
        (lambda t: t.update({"x" * 500 + ".values": torch.ones(3)}), r"tensor 'x+\.\.\. belongs to no target"),
        (lambda t: t.update({"\x1b[31m\n.values": torch.ones(3)}), r"\\x1b\[31m\\n\.values' belongs to no target"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"].double()}), f"{UP}: values F64, bitmask U8"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"].to(torch.float8_e5m2)}), f"{UP}: values F8_E5M2"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"].view(torch.int16)}), f"{UP}: values I16"),
        (lambda t: t.update({UP + ".bitmask": t[UP + ".bitmask"].view(torch.int8)}), f"{UP}: values BF16, bitmask I8"),
        (lambda t: t.update({UP + ".bitmask": t[UP + ".bitmask"].bool()}), f"{UP}: values BF16, bitmask BOOL"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"][:63]}), rf"{UP}: values \[63, 16\] do not match"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"][:, :15].clone()}), f"{UP}: .*do not match"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"].reshape(-1)}), f"{UP}: .*two non-empty matrices"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"].reshape(2, 32, 16)}), f"{UP}: .*two non-empty matrices"),
        (lambda t: t.update({UP + ".values": t[UP + ".values"].T.contiguous()}), f"{UP}: .*do not match"),
        (lambda t: t.update({UP + ".bitmask": t[UP + ".bitmask"][:, :3].clone()}), f"{UP}: .*do not match"),
        (lambda t: t.update({UP + ".bitmask": t[UP + ".bitmask"].reshape(-1)}), f"{UP}: .*two non-empty matrices"),
    ],
)
def test_tensors_that_are_not_what_the_manifest_says(
    victim: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit_tensors(victim, edit)
    refused(SparseCheckpoint.open, victim, message)


def test_a_tied_lm_head_need_not_be_stored(victim: Path) -> None:
    edit_tensors(victim, lambda tensors: tensors.pop("lm_head.weight"))
    assert SparseCheckpoint.open(victim).config.ignored == ("lm_head",)


def test_legal_masks_of_another_run_are_refused(victim: Path) -> None:
    """The popcount of every group is right, only the digest tells."""
    edit_tensors(victim, lambda tensors: tensors[UP + ".bitmask"].bitwise_not_())
    refused(SparseCheckpoint.open, victim, "stored masks have digest sha256:.* but quantization_config says sha256:")


def test_swapped_masks_are_refused(victim: Path) -> None:
    other = TARGETS[4]

    def swap(tensors: dict[str, Tensor]) -> None:
        one, two = tensors[UP + ".bitmask"].clone(), tensors[other + ".bitmask"].clone()
        tensors[UP + ".bitmask"], tensors[other + ".bitmask"] = two, one

    edit_tensors(victim, swap)
    refused(SparseCheckpoint.open, victim, "stored masks have digest")


def test_a_mask_file_posing_as_a_model(victim: Path) -> None:
    bitmasks = {name + ".bitmask": torch.full((64, 4), 0x33, dtype=torch.uint8) for name in TARGETS}
    save_file(bitmasks, victim / "model.safetensors", metadata={"format": "sparse_nm.masks"})
    refused(SparseCheckpoint.open, victim, rf"target {TARGETS[0]}: expected exactly .*bitmask'\]$")
    refused(SparseCheckpoint.open, victim / "model.safetensors", r"tensors: a file, expected a model directory")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-00001-of-00002.safetensors", ".x.safetensors"])
def test_weight_files_beside_the_shards_are_refused(victim: Path, name: str) -> None:
    """Engines that read every *.safetensors of a directory would load them unverified."""
    save_file({UP + ".values": torch.ones(64, 16)}, victim / name)
    refused(SparseCheckpoint.open, victim, f"'{name}' is not one of the checkpoint's shards")


def test_shards_that_make_an_engine_read_another_format(tmp_path: Path) -> None:
    """vLLM prefers `params.json` to `config.json` where the weights have Mistral's names, and takes its sizes."""
    path = sparse_dir(tmp_path / "victim", shard_bytes=8000)
    index = json.loads((path / INDEX_NAME).read_text())
    last = max(index["weight_map"].values())
    (path / last).rename(path / "consolidated.safetensors")
    for name, shard in index["weight_map"].items():
        index["weight_map"][name] = "consolidated.safetensors" if shard == last else shard
    (path / INDEX_NAME).write_text(json.dumps(index))
    refused(SparseCheckpoint.open, path, r"'consolidated\.safetensors' belongs to Mistral's format")


@pytest.mark.parametrize("kind", ["file", "directory", "dangling"])
def test_a_configuration_in_another_format(victim: Path, kind: str) -> None:
    file = victim / "params.json"
    if kind == "file":
        file.write_text('{"dim": 1000000}')
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(victim / "none")
    refused(SparseCheckpoint.open, victim, r"'params\.json' belongs to Mistral's format")


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "loop", "dangling", "missing"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_files_that_are_not_files(victim: Path, file: str, kind: str) -> None:
    path = victim / file
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to({"device": Path("/dev/zero"), "loop": path, "dangling": victim / "none"}[kind])
    refused(SparseCheckpoint.open, victim, rf"{file}: (no such|not a regular) file")
