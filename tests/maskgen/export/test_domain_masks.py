"""Several masks over one dense checkpoint: each a small file, each applied when compressing, weights stored once."""

from __future__ import annotations

from pathlib import Path

import torch

from maskgen.core.digest import digest_weights
from maskgen.core.mask import MaskSet
from maskgen.export.compress import compress_masks, decompress, load_masks
from tests.directories import RECIPE, TARGETS, TWO_FOUR, dense_dir, read_all


def domain_masks(dense: Path, seed: int) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    weights = read_all(dense)
    masks = {
        name: TWO_FOUR.mask_from_scores(torch.rand(weights[name + ".weight"].shape, generator=generator))
        for name in TARGETS
    }
    return MaskSet.from_masks(TWO_FOUR, masks, digest_weights(dense), RECIPE)


def test_one_dense_model_many_masks(tmp_path: Path) -> None:
    dense = dense_dir(tmp_path / "dense")
    weights = read_all(dense)
    pruned = sum(weights[name + ".weight"].numel() for name in TARGETS)
    for domain in range(3):
        path = tmp_path / f"{domain}.safetensors"
        domain_masks(dense, domain).save(path)
        masks = load_masks(path)
        with path.open("rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
        assert path.stat().st_size - header_bytes <= pruned / 12 + 17 * len(TARGETS)
        compress_masks(dense, masks, tmp_path / f"sparse-{domain}", ignored=("lm_head",))
        decompress(tmp_path / f"sparse-{domain}", tmp_path / f"back-{domain}")
        for name, weight in read_all(tmp_path / f"back-{domain}").items():
            module = name.removesuffix(".weight")
            expected = weights[name] * masks.mask(module) if module in TARGETS else weights[name]
            assert torch.equal(weight, expected)
    assert len({domain_masks(dense, domain).digest() for domain in range(3)}) == 3
