"""Damaged and hostile mask files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskgen.compress import load_masks
from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from tests.directories import RECIPE, TWO_FOUR, dense_dir, raw_safetensors, refused, sparse_dir

METADATA = {
    "format": "sparse_nm.masks",
    "format_version": "1",
    "pattern": "2:4",
    "base_digest": RECIPE,
    "recipe_digest": RECIPE,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    masks = {f"m.{name}": TWO_FOUR.mask_from_scores(torch.randn(4, 32, generator=generator)) for name in "ab"}
    MaskSet.from_masks(TWO_FOUR, masks, RECIPE, RECIPE).save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


Edit = Callable[[dict[str, Tensor]], Any]


def rewrite(path: Path, metadata: dict[str, str] | None, edit: Edit = lambda _: None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata=metadata)


def test_truncated_anywhere(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"m\.safetensors: not a valid safetensors file"):
            MaskSet.load(path)
    path.write_bytes(whole + b"\0")
    refused(MaskSet.load, path, "not a valid safetensors file")


def test_flipped_bits_never_pass_as_the_same_masks(path: Path) -> None:
    whole, digest = path.read_bytes(), MaskSet.load(path).digest()
    positions = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[positions.randrange(len(whole))] ^= 1 << positions.randrange(8)
        path.write_bytes(damaged)
        try:
            masks = MaskSet.load(path)
        except FormatError:
            continue
        assert masks.digest() == digest or masks.names != ("m.a", "m.b")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "pt"}, "not a mask file"),
        ({"extra": "1"}, "not a mask file: metadata keys"),
        ({"x" * 10**6: "1"}, "not a mask file: metadata keys"),
        ({"format_version": "2"}, "format_version '2', this release reads 1"),
        ({"format_version": "1.0"}, r"format_version '1\.0'"),
        ({"format_version": " 1"}, "format_version ' 1'"),
        ({"format_version": "9" * 10**6}, "format_version '9+"),
        ({"pattern": "2:4; import os"}, "pattern '2:4; import os'"),
        ({"pattern": "4:4"}, "pattern 4:4"),
        ({"pattern": "1:4"}, "m.[ab]: row 0, columns 0..3 keep 2 weights, expected 1"),
        ({"pattern": "2:6"}, "32 columns are no multiple of 6"),
        ({"base_digest": "sha256:0"}, "base_digest: 'sha256:0' is not a digest"),
        ({"recipe_digest": ""}, "recipe_digest: '' is not a digest"),
    ],
)
def test_metadata(path: Path, changes: dict[str, str], message: str) -> None:
    rewrite(path, {**METADATA, **changes})
    refused(MaskSet.load, path, message)


@pytest.mark.parametrize("missing", [None, *METADATA])
def test_missing_metadata(path: Path, missing: str | None) -> None:
    rewrite(path, None if missing is None else {key: value for key, value in METADATA.items() if key != missing})
    refused(MaskSet.load, path, "not a mask file: metadata keys .*--masks-out")


ROW = torch.full((4, 4), 0x33, dtype=torch.uint8)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t["m.a.bitmask"][2].__setitem__(3, 0x37), r"m\.a: row 2, columns 24\.\.27 keep 3 weights"),
        (lambda t: t["m.a.bitmask"].zero_(), r"m\.a: row 0, columns 0\.\.3 keep 0 weights"),
        (lambda t: t.update({"m.a": ROW.clone()}), "tensor 'm.a': U8"),
        (lambda t: t.update({"m.c.weight": ROW.clone()}), r"tensor 'm\.c\.weight': U8"),
        (lambda t: t.update({"m.c.bitmask": ROW.bool()}), r"tensor 'm\.c\.bitmask': BOOL"),
        (lambda t: t.update({"m.c.bitmask": ROW.view(torch.int8)}), r"tensor 'm\.c\.bitmask': I8"),
        (lambda t: t.update({"m.c.bitmask": ROW.reshape(-1).clone()}), r"tensor 'm\.c\.bitmask': U8 \[16\]"),
        (lambda t: t.update({"m.c.bitmask": ROW.reshape(4, 2, 2).clone()}), r"tensor 'm\.c\.bitmask': U8 \[4, 2, 2\]"),
        (lambda t: t.update({"m.c.bitmask": ROW[:0].clone()}), r"U8 \[0, 4\]; .*no empty side"),
        (lambda t: t.update({".bitmask": ROW.clone()}), "holds '', which is not a dotted module name"),
        (lambda t: t.update({"../x.bitmask": ROW.clone()}), r"holds '\.\./x', which is not"),
        (lambda t: t.update({"a\nb.bitmask": ROW.clone()}), r"holds 'a\\nb', which is not"),
        (lambda t: t.update({"x" * 10**6 + ".bitmask": ROW.clone()}), r"holds 'x+\.\.\., which is not"),
    ],
)
def test_tensors(path: Path, edit: Edit, message: str) -> None:
    rewrite(path, METADATA, edit)
    refused(MaskSet.load, path, message)


def test_no_masks(path: Path) -> None:
    rewrite(path, METADATA, lambda tensors: tensors.clear())
    refused(MaskSet.load, path, "holds no masks")


def test_a_mask_given_twice(path: Path) -> None:
    one = '"a.bitmask":{"dtype":"U8","shape":[1,1],"data_offsets":[0,1]}'
    raw_safetensors(path, f"{{{one},{one}}}".encode(), b"\x33")
    refused(MaskSet.load, path, r"m\.safetensors: not valid JSON: duplicate key 'a\.bitmask'")


def test_other_things_posing_as_masks(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse")
    refused(MaskSet.load, sparse / "model.safetensors", "not a mask file")
    refused(MaskSet.load, sparse, "not a regular file")
    refused(MaskSet.load, tmp_path / "none.safetensors", "no such file")
    refused(load_masks, dense_dir(tmp_path / "dense"), "a dense model")
    (tmp_path / "m.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(MaskSet.load, tmp_path / "m.pt", "not a valid safetensors file")
