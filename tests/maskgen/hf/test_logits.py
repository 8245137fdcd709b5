"""Logits in pieces are the model's own, whatever its head does, and no more of them are there than was said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskgen.core.perplexity import Protocol
from maskgen.hf import evaluate, logits
from maskgen.hf.logits import logits_of
from tests import families, models
from tests.maskgen.arithmetic import ProductDtypes, processor_has_bfloat16

IDS_BT = torch.randint(models.VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))
PIECE_TOKENS = 5


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    known = families.FAMILIES[family]
    return models.randomise(known.make(known.config()), dtype=dtype)  # type: ignore[operator]


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "PIECE_ELEMENTS", len(IDS_BT) * PIECE_TOKENS * models.VOCABULARY)


def head_tokens(model: nn.Module) -> list[int]:
    """How many tokens of each window the head gets, call by call."""
    seen: list[int] = []
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda head, args, output: seen.append(output.shape[1]))
    return seen


@torch.no_grad()
@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_pieces_of_every_architecture_are_its_logits(family: str) -> None:
    """Among them Gemma 2 with capped logits, Granite and Cohere with scaled ones."""
    model = build(family)
    whole_BTV = model(input_ids=IDS_BT, use_cache=False).logits
    run = logits_of(model)
    seen = head_tokens(model)
    pieces = list(run(IDS_BT))
    assert [piece.shape[1] for piece in pieces] == [5, 5, 5, 5, 5, 5, 3]
    assert max(seen) == PIECE_TOKENS and len(seen) == 1 + len(pieces)
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BTV, rtol=1e-4, atol=1e-4)
    model(input_ids=IDS_BT, use_cache=False)
    assert seen[-1] == IDS_BT.shape[1], "the model is as it was"


@torch.no_grad()
@pytest.mark.usefixtures("short_pieces")
def test_the_head_runs_only_as_pieces_are_asked_for() -> None:
    model = build("llama")
    run, seen = logits_of(model), head_tokens(model)
    blocks = list[int]()
    model.model.layers[0].register_forward_hook(lambda *call: blocks.append(1))
    pieces = run(IDS_BT)
    assert (seen, blocks) == ([1], [1])
    next(pieces)
    assert (seen, blocks) == ([1, 5], [1])


@torch.no_grad()
@pytest.mark.usefixtures("short_pieces")
def test_a_head_that_mixes_tokens_is_run_whole() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda head, args, output: output.cumsum(1))
    expected_BTV = model(input_ids=IDS_BT, use_cache=False).logits
    run, seen = logits_of(model), head_tokens(model)
    assert torch.equal(torch.cat(list(run(IDS_BT)), 1), expected_BTV) and seen == [IDS_BT.shape[1]]


@torch.no_grad()
@pytest.mark.usefixtures("short_pieces")
def test_a_model_without_a_part_below_its_head_is_run_whole() -> None:
    class Answer:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(models.VOCABULARY, models.VOCABULARY)

        def forward(self, input_ids: Tensor, use_cache: bool) -> Answer:
            return Answer(self.table(input_ids))

    model = Table()
    pieces = list(logits_of(model)(IDS_BT))
    assert len(pieces) == 7 and torch.equal(torch.cat(pieces, 1), model.table(IDS_BT))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("protocol", [Protocol(32), Protocol(24, stride_tokens=5)])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "opt"])
def test_what_is_measured_does_not_depend_on_pieces(
    family: str, protocol: Protocol, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense = build(family, dtype), build(family, dtype)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.02)
    windows = protocol.windows(IDS_BT.flatten().tolist())
    both = logits_of(model), logits_of(dense)
    whole = evaluate.measure(both[0], windows, protocol, 2, both[1])
    monkeypatch.setattr(logits, "PIECE_ELEMENTS", 2 * PIECE_TOKENS * models.VOCABULARY)
    seen = head_tokens(model)
    pieces = evaluate.measure(both[0], windows, protocol, 2, both[1])
    assert 0 < max(seen) <= 2 * PIECE_TOKENS  # a window that is alone in its batch
    room = 1e-5 if dtype == torch.float32 else 1e-2
    assert pieces.perplexity.nll_per_window == pytest.approx(whole.perplexity.nll_per_window, rel=room)
    assert pieces.dense is not None and whole.dense is not None
    assert pieces.dense.nll_per_window == pytest.approx(whole.dense.nll_per_window, rel=room)
    assert pieces.divergence is not None and whole.divergence is not None
    assert pieces.divergence.kl_per_window == pytest.approx(whole.divergence.kl_per_window, rel=10 * room)
    assert pieces.divergence.agreement == pytest.approx(whole.divergence.agreement, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize(("fast", "multiplied"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_model_is_multiplied_in_what_the_processor_is_fast_in(
    fast: bool, multiplied: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has_bfloat16(monkeypatch, fast)
    model = build("llama", torch.bfloat16)
    run = logits_of(model)
    with ProductDtypes() as dtypes:
        (piece_BTV,) = run(IDS_BT)
    assert dtypes.seen == {multiplied} and piece_BTV.dtype is torch.bfloat16
    rounding = 8 * torch.finfo(torch.bfloat16).eps * piece_BTV.abs().max()
    assert (piece_BTV - model(input_ids=IDS_BT, use_cache=False).logits).abs().max() <= rounding
