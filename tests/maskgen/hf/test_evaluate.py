"""Perplexity against a per-token loop in float64."""

from __future__ import annotations

import math

import pytest
import torch

from maskgen.core.errors import DataError, NumericalError
from maskgen.core.perplexity import Protocol
from maskgen.hf import evaluate
from tests import models

IDS = torch.randint(models.VOCABULARY, (100,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def plain_nll(model: torch.nn.Module, ids: list[int], first: int) -> float:
    """Mean over scored tokens, each from its own forward pass over its own prefix."""
    losses = []
    for position in range(first, len(ids)):
        logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[ids[position]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch", [1, 3])
def test_non_overlapping_windows(batch: int) -> None:
    model = models.build("llama")
    result = evaluate.perplexity(model, IDS, Protocol(16), batch=batch)
    expected = [plain_nll(model, IDS[start : start + 16], 1) for start in range(0, 96, 16)]
    assert result.nll_per_window == pytest.approx(expected, rel=1e-5)
    assert result.value == pytest.approx(math.exp(sum(expected) / 6), rel=1e-5)
    assert result.scored_tokens_per_window == [15] * 6


def test_stride_and_bos_and_limit() -> None:
    model = models.build("qwen2")
    strided = evaluate.perplexity(model, IDS, Protocol(20, stride_tokens=5, max_windows=3), batch=2)
    expected = [plain_nll(model, IDS[:20], 1), *(plain_nll(model, IDS[5 * i : 5 * i + 20], 15) for i in (1, 2))]
    assert strided.nll_per_window == pytest.approx(expected, rel=1e-5)
    with_bos = evaluate.perplexity(model, IDS, Protocol(20, bos=True, max_windows=1), [0])
    assert with_bos.nll_per_window == pytest.approx([plain_nll(model, [0, *IDS[:19]], 1)], rel=1e-5)


def test_slices_do_not_change_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("llama")
    whole = evaluate.perplexity(model, IDS, Protocol(32))
    monkeypatch.setattr(evaluate, "_SLICE_BYTES", 5 * models.VOCABULARY * 4)
    assert evaluate.perplexity(model, IDS, Protocol(32)).nll_per_window == pytest.approx(whole.nll_per_window)


def test_progress_and_half_precision() -> None:
    seen: list[tuple[int, int]] = []
    exact = evaluate.perplexity(models.build("llama"), IDS, Protocol(16))
    half = evaluate.perplexity(
        models.build("llama", dtype=torch.bfloat16), IDS, Protocol(16), batch=4, progress=lambda *at: seen.append(at)
    )
    assert seen == [(4, 6), (6, 6)]
    assert half.value == pytest.approx(exact.value, rel=0.05) and half.value != exact.value
    assert half.tokens_digest == exact.tokens_digest


@torch.no_grad()
def test_errors() -> None:
    model = models.build("llama")
    with pytest.raises(DataError, match="the model reads at most 128; lower `window_tokens`"):
        evaluate.check_window(Protocol(256), models.MAX_TOKENS)
    evaluate.check_window(Protocol(256), None)
    with pytest.raises(DataError, match="shorter than one window"):
        evaluate.perplexity(model, IDS[:10], Protocol(16))
    with pytest.raises(DataError, match="batch 0"):
        evaluate.perplexity(model, IDS, Protocol(16), batch=0)
    model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="the model's loss is nan"):
        evaluate.perplexity(model, IDS, Protocol(16))
