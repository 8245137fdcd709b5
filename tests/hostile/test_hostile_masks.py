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

from maskgen.core.errors import FormatError
from maskgen.core.mask import MaskSet
from maskgen.core.pattern import NMPattern
from maskgen.export.compress import load_masks
from tests.directories import RECIPE, TWO_FOUR, dense_dir, raw_safetensors, refused, sparse_dir

METADATA = {
    "format": "sparse_nm.masks",
    "format_version": "2",
    "encoding": "pattern-digits",
    "pattern": "2:4",
    "mask_digest": RECIPE,
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
        assert masks.digest() == digest


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "pt"}, "not a mask file"),
        ({"extra": "1"}, "not a mask file: metadata keys"),
        ({"x" * 10**6: "1"}, "not a mask file: metadata keys"),
        ({"format_version": "1"}, "format_version '1', this release reads 2"),
        ({"format_version": "3"}, "format_version '3', this release reads 2"),
        ({"format_version": "1.0"}, r"format_version '1\.0'"),
        ({"format_version": " 1"}, "format_version ' 1'"),
        ({"format_version": "9" * 10**6}, "format_version '9+"),
        ({"pattern": "2:4; import os"}, "pattern '2:4; import os'"),
        ({"pattern": "4:4"}, "pattern 4:4"),
        ({"encoding": "bits"}, "encoding 'bits', expected 'pattern-digits' for pattern 2:4"),
        ({"encoding": "base6"}, "encoding 'base6', expected 'pattern-digits'"),
        ({"encoding": "x" * 10**6}, "encoding 'x+"),
        ({"pattern": "4:8"}, "encoding 'pattern-digits', expected 'bits' for pattern 4:8"),
        ({"pattern": "1:4"}, r"m.[ab]: 11 bytes of digits for a 1:4 mask \[4, 32\], expected 8"),
        ({"pattern": "4:6"}, r"m.[ab]: a mask \[4, 32\]; expected .* a multiple of 24 for pattern 4:6"),
        ({}, f"the masks have digest sha256:.*, the file says {RECIPE}; it is damaged or was changed"),
        ({"mask_digest": "sha256:0"}, "mask_digest: 'sha256:0' is not a digest"),
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


DIGITS = torch.zeros(11, dtype=torch.uint8)
SHAPE = torch.tensor([4, 32])


def shaped(*sides: int) -> Edit:
    return lambda tensors: tensors["m.a.shape"].copy_(torch.tensor(sides))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t["m.a.digits"].__setitem__(3, 216), r"m\.a: a byte of 216, but 3 digits of base 6 end at 215"),
        (lambda t: t["m.a.digits"].fill_(255), r"m\.a: a byte of 255"),
        (lambda t: t["m.a.digits"].__setitem__(10, 36), r"m\.a: a last byte of 36, but 2 digits of base 6 end at 35"),
        (lambda t: t.update({"m.a.digits": DIGITS[:-1].clone()}), r"m\.a: 10 bytes of digits .* expected 11"),
        (lambda t: t.update({"m.a.digits": DIGITS[:0].clone()}), r"m\.a: 0 bytes of digits"),
        (lambda t: t.update({"m.a.digits": torch.zeros(12, dtype=torch.uint8)}), r"m\.a: 12 bytes of digits"),
        (
            lambda t: t.update({"m.a.digits": DIGITS.view(torch.int8)}),
            r"m\.a: digits I8 \[11\], .* expected U8 \[bytes",
        ),
        (lambda t: t.update({"m.a.digits": DIGITS.bool()}), r"m\.a: digits BOOL \[11\]"),
        (lambda t: t.update({"m.a.digits": DIGITS[None].clone()}), r"m\.a: digits U8 \[1, 11\]"),
        (lambda t: t.update({"m.a.shape": SHAPE.int()}), r"m\.a: .* shape I32 \[2\]; expected .* I64 \[2\]"),
        (lambda t: t.update({"m.a.shape": SHAPE[:1].clone()}), r"m\.a: .* shape I64 \[1\]"),
        (lambda t: t.update({"m.a.shape": SHAPE[None].clone()}), r"m\.a: .* shape I64 \[1, 2\]"),
        (shaped(0, 32), r"m\.a: a mask \[0, 32\]; expected positive numbers"),
        (shaped(4, 0), r"m\.a: a mask \[4, 0\]"),
        (shaped(-4, -32), r"m\.a: a mask \[-4, -32\]"),
        (shaped(-(2**63), 32), r"m\.a: a mask \[-9223372036854775808, 32\]"),
        (shaped(32, 4), r"m\.a: a mask \[32, 4\]; expected .* a multiple of 8 for pattern 2:4"),
        (shaped(2**62, 2**62), r"m\.a: 11 bytes of digits for a 2:4 mask \[4611686018427387904, 4611686018427387904\]"),
        (lambda t: t.pop("m.a.shape"), r"tensor 'm\.a\.shape' is missing; every mask is '<module>\.digits' and"),
        (lambda t: t.pop("m.a.digits"), r"tensor 'm\.a\.shape' is unexpected"),
        (lambda t: t.update({"m.a": DIGITS.clone()}), r"tensor 'm\.a' is unexpected"),
        (lambda t: t.update({"m.c.bitmask": DIGITS.clone()}), r"tensor 'm\.c\.bitmask' is unexpected"),
        (
            lambda t: t.update({".digits": DIGITS.clone(), ".shape": SHAPE}),
            "holds '', which is not a dotted module name",
        ),
        (lambda t: t.update({"../x.digits": DIGITS.clone(), "../x.shape": SHAPE}), r"holds '\.\./x', which is not"),
        (lambda t: t.update({"a\nb.digits": DIGITS.clone(), "a\nb.shape": SHAPE}), r"holds 'a\\nb', which is not"),
        (lambda t: t.update({"x" * 10**6 + ".digits": DIGITS.clone()}), r"tensor 'x+\.\.\. is missing"),
    ],
)
def test_digits(path: Path, edit: Edit, message: str) -> None:
    rewrite(path, METADATA, edit)
    refused(MaskSet.load, path, message)


ROW = torch.full((4, 4), 0x0F, dtype=torch.uint8)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t["m.a.bitmask"][2].__setitem__(3, 0x1F), r"m\.a: row 2, columns 24\.\.31 keep 5 weights"),
        (lambda t: t["m.a.bitmask"].zero_(), r"m\.a: row 0, columns 0\.\.7 keep 0 weights"),
        (lambda t: t.update({"m.a": ROW.clone()}), "tensor 'm.a': U8"),
        (lambda t: t.update({"m.a.digits": DIGITS.clone()}), r"tensor 'm\.a\.digits': U8"),
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
def test_bits(tmp_path: Path, edit: Edit, message: str) -> None:
    path = tmp_path / "m.safetensors"
    MaskSet(NMPattern(4, 8), {"m.a": ROW.clone()}, RECIPE, RECIPE).save(path)
    rewrite(path, {**METADATA, "encoding": "bits", "pattern": "4:8"}, edit)
    refused(MaskSet.load, path, message)


def test_bits_of_another_pattern(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    MaskSet(NMPattern(4, 8), {"m.a": ROW.clone()}, RECIPE, RECIPE).save(path)
    rewrite(path, {**METADATA, "encoding": "bits", "pattern": "3:6"})
    refused(MaskSet.load, path, "32 columns are no multiple of 6")


def test_no_masks(path: Path) -> None:
    rewrite(path, METADATA, lambda tensors: tensors.clear())
    refused(MaskSet.load, path, "holds no masks")


def test_a_mask_given_twice(path: Path) -> None:
    one = '"a.digits":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    raw_safetensors(path, f"{{{one},{one}}}".encode(), b"\x33")
    refused(MaskSet.load, path, r"m\.safetensors: not valid JSON: duplicate key 'a\.digits'")


def test_other_things_posing_as_masks(tmp_path: Path) -> None:
    sparse = sparse_dir(tmp_path / "sparse")
    refused(MaskSet.load, sparse / "model.safetensors", "not a mask file")
    refused(MaskSet.load, sparse, "not a regular file")
    refused(MaskSet.load, tmp_path / "none.safetensors", "no such file")
    refused(load_masks, dense_dir(tmp_path / "dense"), "a dense model")
    (tmp_path / "m.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(MaskSet.load, tmp_path / "m.pt", "not a valid safetensors file")
