"""A model pruned in place is compared with what it was, as if both were still there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskgen.core.errors import ModelError
from maskgen.hf import evaluate
from maskgen.hf.layers import decoder_blocks
from maskgen.hf.logits import logits_of
from maskgen.hf.pruning_cost import Baseline, HeldOutText, placed, quality_of
from tests import models

IDS_ST = torch.randint(models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
TEXT = HeldOutText(IDS_ST, 0, ["text"])


def told(*progress: int) -> None:
    """A listener that does not care."""


@torch.no_grad()
def damage(pruned: torch.nn.Module) -> None:
    """Change every weight of the blocks, in place."""
    for weight in decoder_blocks(pruned)[1].parameters():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype) * 0.02)


@pytest.mark.parametrize("kind", models.BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_is_there_again(kind: str, dtype: torch.dtype) -> None:
    dense, pruned = models.build(kind, dtype=dtype), models.build(kind, dtype=dtype)
    before = Baseline.record(pruned, list(decoder_blocks(pruned)[1]), TEXT, told)
    damage(pruned)
    with placed(pruned, "cpu"):
        found = before.compare(pruned, told)
    both = (logits_of(pruned), logits_of(dense))
    assert found == evaluate.measure(both[0], TEXT.windows, TEXT.protocol, 1, both[1])
    quality = quality_of(found, TEXT, "wanda", "2:4")
    assert (quality.windows, quality.window_tokens, quality.texts) == (3, 24, ("text",)) and quality.kl > 0
    assert found.dense is not None and quality.dense_perplexity == pytest.approx(found.dense.value)
    blocks = decoder_blocks(pruned)[1]
    assert all("forward" not in vars(block) and not block._forward_hooks for block in blocks), "all is as it was"


def test_bos_is_not_scored() -> None:
    text = HeldOutText(IDS_ST, 2, ["text"])
    assert [window.first_scored for window in text.windows] == [2, 2, 2] and text.protocol.bos


def test_a_model_whose_logits_need_more_than_the_last_block_is_not_measured() -> None:
    dense = models.build("llama")
    blocks = list(decoder_blocks(dense)[1])
    seen: list[Any] = []
    blocks[0].register_forward_hook(lambda block, args, output: seen.append(output))
    dense.lm_head.register_forward_hook(lambda head, args, logits: logits + len(seen) * seen[-1].mean())
    with pytest.raises(ModelError, match="more than the last block's output decides the logits"):
        Baseline.record(dense, blocks, TEXT, told)


def test_a_model_that_cannot_be_run_on_text_alone_is_not_measured() -> None:
    dense = models.build("llama")
    dense.forward = lambda input_ids, use_cache: dense.picture  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelError, match=r"cannot be run on text alone: .*picture"):
        Baseline.record(dense, list(decoder_blocks(dense)[1]), TEXT, told)
