"""Every family of models is pruned as a whole, with everything that stays dense named, or refused by name.

What is written is read back in three ways that must agree: tensor by tensor, by transformers through our loader, and by
transformers alone after `decompress`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import maskgen
from maskgen.core.checkpoint import SparseCheckpoint, iterate_tensors, read_headers
from maskgen.core.errors import ModelError
from maskgen.hf import loader
from maskgen.hf.dense import OUTSIDE
from maskgen.hf.planning import Plan
from maskgen.hf.stored import numbers_as_stars
from tests.families import FAMILIES

SUPPORTED = [name for name, family in FAMILIES.items() if family.pruned]
REFUSED = {
    "gpt2": r"GPT2LMHeadModel: transformer\.h\.0\.attn\.c_attn is a Conv1D .*models made of nn\.Linear can, such as",
    "llava": "LlavaForConditionalGeneration is not supported: .*AutoModelForCausalLM",
}
SMALL = {"calibration.samples": 4, "calibration.window_tokens": 24, "calibration.batch": 2}
LEARNED = {
    "train.steps": 2,
    "train.batch": 2,
    "train.window_tokens": 16,
    "train.heldout_windows": 4,
    "calibration.samples": 4,
    "calibration.window_tokens": 16,
}
IN_BLOCK = re.compile(
    r"(?:language_model\.)?(?:gpt_neox|model|model\.decoder|transformer)\.(?:layers|h|blocks)\.\d+\.(.+)"
)


@pytest.fixture(autouse=True)
def _registered() -> None:
    loader.register()


@torch.no_grad()
def logits(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    result: Tensor = model(torch.arange(2, 42).view(2, 20)).logits
    return result


def relative(names: Iterable[str]) -> set[str]:
    """Names in blocks, relative to them."""
    return {numbers_as_stars(match[1]) for name in names if (match := IN_BLOCK.fullmatch(name))}


def check_plan(plan: Plan, targets: set[str], original: Mapping[str, Tensor]) -> None:
    """Every matrix of the blocks is a target, or ignored with a reason, and counted."""
    sizes = {name: weight.numel() for name, weight in original.items() if IN_BLOCK.fullmatch(name) and weight.ndim > 1}
    for stored in sizes:
        name = stored.removesuffix(".weight")
        parents = {name[: dot.start()] for dot in re.finditer(r"\.|$", name)}
        assert (name in targets) != bool(parents & plan.ignored.keys()), stored
    assert all(reason != OUTSIDE for name, reason in plan.ignored.items() if IN_BLOCK.fullmatch(name))
    assert plan.share == pytest.approx(sum(sizes[name + ".weight"] for name in targets) / sum(sizes.values()))
    assert plan.share + math.fsum(one.share for one in plan.kept) == pytest.approx(1)


@pytest.mark.parametrize("name", SUPPORTED)
def test_pruned_as_a_whole(name: str, text_file: Path, tmp_path: Path) -> None:
    dense = FAMILIES[name].save(tmp_path / "dense", dtype=torch.bfloat16)
    original, before_BTV = dict(iterate_tensors(read_headers(dense))), logits(dense)
    unserved = {} if FAMILIES[name].served else {"allow_unserved": True}
    for recipe, needed in (("magnitude", unserved), ("wanda", {"data": text_file, "overrides": SMALL, **unserved})):
        sparse, masked = tmp_path / recipe, tmp_path / f"{recipe}-masked"
        result = maskgen.prune(maskgen.PruneRequest(recipe=recipe, model=dense, out=sparse, **needed))
        assert isinstance(result, maskgen.PruneResult)
        checkpoint = SparseCheckpoint.open(sparse)
        targets = set(checkpoint.config.targets)
        assert relative(targets) == set(FAMILIES[name].pruned)
        assert relative(result.plan.ignored) == set(FAMILIES[name].dense)
        assert set(checkpoint.config.ignored) <= result.plan.ignored.keys()
        check_plan(result.plan, targets, original)
        for target in targets:
            mask_OI, weight_OI = checkpoint.packed(target).mask(), original[target + ".weight"]
            assert (mask_OI.unflatten(1, (-1, 4)).sum(-1) == 2).all()
            assert torch.equal(checkpoint.packed(target).unpack(), torch.where(mask_OI, weight_OI, 0))
        kept = {stored: tensor for stored, tensor in original.items() if stored.removesuffix(".weight") not in targets}
        assert all(torch.equal(checkpoint.tensor(stored), tensor) for stored, tensor in kept.items())
        maskgen.decompress(maskgen.DecompressRequest(model=sparse, out=masked))
        assert torch.equal(logits(sparse), logits(masked)) and not torch.equal(logits(sparse), before_BTV)
        assert maskgen.inspect(maskgen.InspectRequest(model=sparse)).kept == result.plan.kept


@pytest.mark.parametrize(("name", "recipe"), [("gemma3_vision", "maskllm"), ("phi3", "adaptive_sparse_slorb")])
def test_learned_masks_under_stored_names(name: str, recipe: str, text_file: Path, tmp_path: Path) -> None:
    dense, sparse = FAMILIES[name].save(tmp_path / "dense"), tmp_path / "sparse"
    result = maskgen.learn(
        maskgen.LearnRequest(recipe=recipe, model=dense, data=text_file, out=sparse, overrides=LEARNED)
    )
    assert isinstance(result, maskgen.LearnResult)
    assert relative(SparseCheckpoint.open(sparse).config.targets) == set(FAMILIES[name].pruned)
    maskgen.decompress(maskgen.DecompressRequest(model=sparse, out=tmp_path / "masked"))
    assert torch.equal(logits(sparse), logits(tmp_path / "masked")) and logits(sparse).isfinite().all()


def test_what_vllm_does_not_have_is_refused_unless_allowed(tmp_path: Path) -> None:
    dense = FAMILIES["mpt"].save(tmp_path / "dense")
    with pytest.raises(ModelError, match=r"MptForCausalLM: vLLM 0\.\d+\.\d+ has no such model, .*`allow_unserved`"):
        maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=dense, out=tmp_path / "sparse"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.pruned])
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    dense = FAMILIES[name].save(tmp_path / "dense")
    with pytest.raises(ModelError, match=REFUSED[name]) as caught:
        maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=dense, out=tmp_path / "sparse"))
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["dense"]
