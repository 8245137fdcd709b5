"""Bitmasks and mask files: bits are where the format says, and a digest depends on the bits and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maskgen.core.errors import FormatError, PatternError
from maskgen.core.mask import MaskSet, check_bits, pack_bits, unpack_bits
from maskgen.core.pattern import NMPattern
from tests.directories import RECIPE, TWO_FOUR

BASE = "sha256:" + "b" * 64
bool_matrices = st.tuples(st.integers(0, 6), st.integers(0, 6)).flatmap(
    lambda size: arrays(np.bool_, (size[0], size[1] * 8))
)


def mask_set(seed: int = 0, names: tuple[str, ...] = ("a.up", "a.down")) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    masks = {name: TWO_FOUR.mask_from_scores(torch.randn(4, 16, generator=generator)) for name in sorted(names)}
    return MaskSet.from_masks(TWO_FOUR, {name: masks[name] for name in names}, BASE, RECIPE)


@settings(max_examples=50, deadline=None)
@given(bool_matrices)
def test_packs_like_numpy_and_back(mask: np.ndarray) -> None:
    packed = pack_bits(torch.from_numpy(mask))
    assert np.array_equal(packed.numpy(), np.packbits(mask, axis=1, bitorder="little"))
    by_hand = [[sum(1 << j for j in range(8) if row[8 * k + j]) for k in range(len(row) // 8)] for row in mask]
    assert packed.tolist() == by_hand
    assert np.array_equal(unpack_bits(packed).numpy(), mask)


def test_bit_j_of_byte_k_is_column_8k_plus_j() -> None:
    for column in range(16):
        mask = torch.arange(16).eq(column).reshape(1, 16)
        assert pack_bits(mask).tolist() == [[1 << column if column < 8 else 0, 1 << column - 8 if column > 7 else 0]]


def test_packs_views() -> None:
    mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)).gt(0.5).T
    assert torch.equal(unpack_bits(pack_bits(mask)), mask)


@pytest.mark.parametrize("mask", [torch.ones(2, 8), torch.ones(8) > 0, torch.ones(2, 12) > 0, torch.ones(1, 2, 8) > 0])
def test_pack_refuses(mask: torch.Tensor) -> None:
    with pytest.raises(PatternError, match="I a multiple of 8"):
        pack_bits(mask)


@pytest.mark.parametrize("bitmask", [torch.ones(2, 8), torch.ones(8, dtype=torch.uint8), torch.ones(2, 8) > 0])
def test_unpack_refuses(bitmask: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="expected uint8"):
        unpack_bits(bitmask)


def test_check_bits_finds_one_wrong_bit_among_many() -> None:
    bitmask = pack_bits(TWO_FOUR.mask_from_scores(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))))
    check_bits(bitmask, TWO_FOUR, "q")
    bitmask[40, 5] ^= 0b00010000
    with pytest.raises(FormatError, match=r"q: row 40, columns 44..47 keep [13] weights, expected 2 \(1 of 1024"):
        check_bits(bitmask, TWO_FOUR, "q")


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "4:8", "3:16"])
def test_check_bits_judges_every_byte_as_check_mask_does(pattern: str) -> None:
    parsed = NMPattern.parse(pattern)
    for byte in range(256):
        bitmask = torch.tensor([[byte, 0b11]], dtype=torch.uint8)[:, : max(1, parsed.m // 8)]
        try:
            parsed.check_mask(unpack_bits(bitmask))
        except PatternError:
            with pytest.raises(FormatError, match="q: row 0"):
                check_bits(bitmask, parsed, "q")
        else:
            check_bits(bitmask, parsed, "q")


def test_groups_may_cross_bytes() -> None:
    pattern = NMPattern(3, 6)
    mask = pattern.mask_from_scores(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)))
    check_bits(pack_bits(mask), pattern, "q")


def test_from_masks_checks_the_pattern() -> None:
    with pytest.raises(PatternError, match=r"a\.up: row 0"):
        MaskSet.from_masks(TWO_FOUR, {"a.up": torch.ones(2, 8) > 0}, BASE, RECIPE)


def test_file_round_trip(tmp_path: Path) -> None:
    masks = mask_set()
    masks.save(tmp_path / "new" / "m.safetensors")
    again = MaskSet.load(tmp_path / "new" / "m.safetensors")
    assert (again.pattern, again.base_digest, again.recipe_digest) == (TWO_FOUR, BASE, RECIPE)
    assert again.names == masks.names == ("a.down", "a.up")
    assert all(torch.equal(again.mask(name), masks.mask(name)) for name in masks.names)
    assert again.digest() == masks.digest()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("text", ["1:2", "1:4", "3:4", "4:8", "2:8", "1:8", "2:16", "1:64", "3:6", "8:16"])
def test_file_round_trip_of_every_encoding(tmp_path: Path, text: str) -> None:
    pattern = NMPattern.parse(text)
    generator = torch.Generator().manual_seed(0)
    columns = 3 * pattern.column_multiple
    drawn = {f"m.{rows}": pattern.mask_from_scores(torch.rand(rows, columns, generator=generator)) for rows in (1, 5)}
    masks = MaskSet.from_masks(pattern, drawn, BASE, RECIPE)
    masks.save(tmp_path / "m.safetensors")
    again = MaskSet.load(tmp_path / "m.safetensors")
    assert again.digest() == masks.digest() and again.pattern == pattern
    assert all(torch.equal(again.mask(name), mask) for name, mask in drawn.items())


def test_a_2_4_mask_takes_two_thirds_of_a_bit_per_weight(tmp_path: Path) -> None:
    mask = TWO_FOUR.mask_from_scores(torch.rand(512, 1024, generator=torch.Generator().manual_seed(0)))
    MaskSet.from_masks(TWO_FOUR, {"m": mask}, BASE, RECIPE).save(tmp_path / "m.safetensors")
    assert 0.666 < (tmp_path / "m.safetensors").stat().st_size * 8 / mask.numel() < 0.68


def test_a_mask_that_breaks_its_pattern_is_not_saved(tmp_path: Path) -> None:
    masks = MaskSet(TWO_FOUR, {"m": torch.full((2, 2), 0x37, dtype=torch.uint8)}, BASE, RECIPE)
    with pytest.raises(PatternError, match="row 0"):
        masks.save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    mask_set(seed=1).save(path)
    mask_set().save(path)
    assert MaskSet.load(path).digest() == mask_set().digest()


def test_digest_is_the_documented_recipe() -> None:
    masks = mask_set()
    recipe = b"sparse_nm.masks 2:4"
    for name in ("a.down", "a.up"):
        recipe += f"\n{name} torch.uint8 (4, 2)\n".encode() + masks.bitmasks[name].numpy().tobytes()
    assert masks.digest() == "sha256:" + hashlib.sha256(recipe).hexdigest()


def test_digest_sees_every_bit_name_and_the_pattern_but_not_the_order() -> None:
    masks = mask_set()
    assert mask_set(names=("a.down", "a.up")).digest() == masks.digest()
    renamed = MaskSet(TWO_FOUR, {"a.up2": masks.bitmasks["a.up"], "a.down": masks.bitmasks["a.down"]}, BASE, RECIPE)
    swapped = MaskSet(TWO_FOUR, {"a.up": masks.bitmasks["a.down"], "a.down": masks.bitmasks["a.up"]}, BASE, RECIPE)
    reshaped = MaskSet(TWO_FOUR, {name: value.reshape(2, 4) for name, value in masks.bitmasks.items()}, BASE, RECIPE)
    other = MaskSet(NMPattern(4, 8), masks.bitmasks, BASE, RECIPE)
    digests = {one.digest() for one in (masks, renamed, swapped, reshaped, other, mask_set(seed=1))}
    assert len(digests) == 6


def test_provenance_is_not_part_of_the_digest() -> None:
    masks = mask_set()
    assert MaskSet(TWO_FOUR, masks.bitmasks, RECIPE, BASE).digest() == masks.digest()
