"""Perplexity, divergence and agreement against a per-token loop in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgen.core.divergence import Divergence
from maskgen.core.errors import DataError, ModelError, NumericalError
from maskgen.core.perplexity import Protocol
from maskgen.hf import evaluate
from maskgen.hf.logits import Logits, logits_of
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


def against(
    model: torch.nn.Module, dense: torch.nn.Module, protocol: Protocol, batch: int = 1
) -> tuple[evaluate.Measured, Divergence]:
    logits = (logits_of(model), logits_of(dense))
    found = evaluate.measure(logits[0], protocol.windows(IDS), protocol, batch, logits[1])
    assert found.divergence is not None and found.dense is not None
    return found, found.divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself(dtype: torch.dtype) -> None:
    model = models.build("llama", dtype=dtype)
    found, divergence = against(model, model, Protocol(16), batch=4)
    assert (divergence.kl, divergence.agreement) == (0.0, 1.0)
    assert found.dense == found.perplexity == evaluate.perplexity(model, IDS, Protocol(16), batch=4)


@pytest.mark.parametrize("protocol", [Protocol(32), Protocol(24, stride_tokens=5)])
@torch.no_grad()
def test_divergence_is_what_its_definition_says(protocol: Protocol) -> None:
    model, dense = models.build("llama"), models.build("llama")
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    found, divergence = against(model, dense, protocol, batch=2)
    kl, same = [], []
    for window in protocol.windows(IDS):
        p_TV, q_TV = (one(torch.tensor([window.ids])).logits[0].double().softmax(-1) for one in (dense, model))
        for position in range(window.first_scored - 1, len(window.ids) - 1):
            pairs = zip(p_TV[position].tolist(), q_TV[position].tolist(), strict=True)
            kl.append(math.fsum(p * math.log(p / q) for p, q in pairs))
            same.append(int(p_TV[position].argmax()) == int(q_TV[position].argmax()))
    assert divergence.kl == pytest.approx(math.fsum(kl) / len(kl), rel=1e-5)
    assert divergence.agreement == pytest.approx(sum(same) / len(same)) and 0 < divergence.agreement < 1
    assert found.dense is not None
    assert found.dense.value == pytest.approx(evaluate.perplexity(dense, IDS, protocol).value, rel=1e-6)
    assert found.perplexity.value == pytest.approx(evaluate.perplexity(model, IDS, protocol).value, rel=1e-6)


@given(rows=st.integers(1, 40), batch=st.integers(1, 4), seed=st.integers(1, 3))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_neither_slices_nor_batches_change_a_divergence(rows: int, batch: int, seed: int) -> None:
    model, dense = models.build("qwen2", seed=seed), models.build("qwen2")
    whole = against(model, dense, Protocol(32))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_SLICE_BYTES", rows * models.VOCABULARY * 4)
        cut = against(model, dense, Protocol(32), batch)[1]
    assert cut.kl_per_window == pytest.approx(whole.kl_per_window, rel=1e-5)
    assert cut.agreement_per_window == pytest.approx(whole.agreement_per_window)


def test_logits_of_minus_infinity_are_probability_0() -> None:
    """Some models mask what pads their vocabulary: that adds nothing, and is no NaN."""

    def logits(seed: int, masked: bool) -> Logits:
        def run(ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
            logits_BTV = torch.randn(*ids_BT.shape, 9, generator=torch.Generator().manual_seed(seed))
            padding_BTV = torch.full((*ids_BT.shape, 3), -torch.inf)
            return iter([torch.cat([logits_BTV, padding_BTV], -1) if masked else logits_BTV])

        return run

    protocol = Protocol(8)
    windows = protocol.windows([number % 9 for number in range(16)])
    plain, masked = (
        evaluate.measure(logits(1, masked), windows, protocol, dense=logits(2, masked)) for masked in (False, True)
    )
    assert plain.divergence is not None and masked.divergence is not None
    assert masked.divergence.kl == pytest.approx(plain.divergence.kl) and plain.divergence.kl > 0


def test_models_of_different_vocabularies_are_not_compared() -> None:
    with pytest.raises(ModelError, match="logits for 320 tokens and the dense model for 384; compare a model with"):
        against(models.build("llama"), models.build("llama", vocab_size=384), Protocol(16))


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
