"""Perplexity of a Hugging Face model, dense or sparse, under a stated protocol, alone or beside the dense model.

The windows and the averaging are `maskgen.core.perplexity`'s, shared with the serving side, so that offline and
served results are about the same tokens; what is measured of two models is explained in `maskgen.core.divergence`.
Models run in the dtype they were loaded in. Logits come in pieces of a limited size (`maskgen.hf.logits`) and none are
kept; log-probabilities are always float32, taken in slices of a piece.

Legend: B = batch, T = tokens of a window, n = tokens of a piece, V = vocabulary, N = scored tokens of a slice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from maskgen.core.divergence import Divergence
from maskgen.core.errors import DataError, ModelError, NumericalError
from maskgen.core.perplexity import Perplexity, Protocol, Window, digest_windows
from maskgen.hf.logits import Logits, logits_of

_SLICE_BYTES = 4 << 20
"""Of one float32 slice: what fits into a processor's cache is fastest, and a GPU has enough to do with it."""


@dataclass(frozen=True)
class Measured:
    """A model on one text; `dense` and `divergence` when the dense model was there to compare with."""

    perplexity: Perplexity
    dense: Perplexity | None = None
    divergence: Divergence | None = None


def perplexity(
    model: nn.Module,
    ids: Sequence[int],
    protocol: Protocol,
    bos_ids: Sequence[int] = (),
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score token ids with a causal language model on its own device.

    `bos_ids` go in front of each window if the protocol wants that. `batch` windows of equal length share a forward
    pass. `progress` is called with windows done and in all. Raises `DataError` (too few tokens), `NumericalError` (the
    loss is not finite).
    """
    windows = protocol.windows(ids, bos_ids)
    return measure(logits_of(model), windows, protocol, batch, progress=progress).perplexity


@torch.no_grad()
def measure(
    model: Logits,
    windows: Sequence[Window],
    protocol: Protocol,
    batch: int = 1,
    dense: Logits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Score the windows that `protocol` cut, with `dense` beside `model` where it is given.

    Each is called once per batch, the dense one first. Raises `DataError` (the batch), `ModelError` (they have not the
    same vocabulary), `NumericalError` (a loss is not finite).
    """
    if batch < 1:
        raise DataError(f"batch {batch}: expected at least 1 window")
    found: list[list[float]] = []
    for group in _batches(windows, batch):
        found += _score(group, model, dense)
        if progress is not None:
            progress(len(found), len(windows))
    counts, digest = [len(window.ids) - window.first_scored for window in windows], digest_windows(windows)
    nll, *others = (list(column) for column in zip(*found, strict=True))
    measured = Perplexity(protocol, nll, counts, digest)
    if dense is None:
        return Measured(measured)
    dense_nll, kl, agreement = others
    return Measured(measured, Perplexity(protocol, dense_nll, counts, digest), Divergence(kl, agreement, counts))


def check_window(protocol: Protocol, limit: int | None) -> None:
    """`DataError` when a model that reads at most `limit` tokens (None: any number) cannot read such windows."""
    if limit is not None and protocol.window_tokens > limit:
        raise DataError(
            f"window of {protocol.window_tokens} tokens, but the model reads at most {limit}; lower `window_tokens`"
        )


def _batches(windows: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length, at most `batch` of them."""
    group: list[Window] = []
    for window in windows:
        if group and (len(group) == batch or len(group[0].ids) != len(window.ids)):
            yield group
            group = []
        group.append(window)
    yield group


def _score(group: Sequence[Window], model: Logits, dense: Logits | None) -> list[list[float]]:
    """Of each window, means over its scored tokens: negative log-likelihood, and beside a dense model also that one's,
    KL divergence and top-1 agreement."""
    ids_BT = torch.tensor([window.ids for window in group])
    dense_pieces = itertools.repeat(None) if dense is None else dense(ids_BT)
    pieces, start = model(ids_BT), 0
    # Made at once: small results that stay, each made between large temporaries, would leave holes in the memory.
    numbers_BTk = torch.zeros(*ids_BT.shape, 1 if dense is None else 4, dtype=torch.float64)
    while start < ids_BT.shape[1]:
        dense_BnV, logits_BnV = next(dense_pieces), next(pieces)
        _check_same_width(logits_BnV, dense_BnV)
        for index, window in enumerate(group):
            dense_nV = None if dense_BnV is None else dense_BnV[index]
            _score_piece(numbers_BTk[index], logits_BnV[index], dense_nV, ids_BT[index], window.first_scored, start)
        start += logits_BnV.shape[1]
        del dense_BnV, logits_BnV, dense_nV  # before there are others
    return [_means(numbers_Tk[window.first_scored :]) for window, numbers_Tk in zip(group, numbers_BTk, strict=True)]


def _score_piece(
    numbers_Tk: Tensor, logits_nV: Tensor, dense_nV: Tensor | None, ids_T: Tensor, first: int, start: int
) -> None:
    """Write the numbers of every token that a piece predicts, and that is scored; the piece begins at token `start`."""
    rows = max(1, _SLICE_BYTES // (4 * logits_nV.shape[-1]))
    end = min(len(ids_T), start + len(logits_nV) + 1)
    for token in range(max(first, start + 1), end, rows):  # logits at t are about token t + 1
        tokens = slice(token, min(token + rows, end))
        predicting = slice(token - 1 - start, tokens.stop - 1 - start)
        dense_NV = None if dense_nV is None else dense_nV[predicting].to(logits_nV.device)
        targets_N = ids_T[tokens].to(logits_nV.device)
        numbers_Tk[tokens] = _score_slice(logits_nV[predicting], dense_NV, targets_N).to("cpu")


def _means(numbers_Tk: Tensor) -> list[float]:
    """Means of each number over the scored tokens. `NumericalError` if one is not finite."""
    means = numbers_Tk.T.contiguous().mean(1)
    if not means.isfinite().all():
        raise NumericalError(
            f"the model's loss is {float(means[0])}; check its weights, or evaluate with `dtype` float32"
            if not means[0].isfinite()
            else "the dense model's loss, or the divergence from it, is not a finite number; check its weights"
        )
    return list(map(float, means))


def _score_slice(logits_NV: Tensor, dense_NV: Tensor | None, targets_N: Tensor) -> Tensor:
    """The numbers of `_score` for every token, float64 `[N, 1]`, or `[N, 4]` beside a dense model."""
    log_q_NV = log_softmax(logits_NV.float(), -1)
    rows = [-log_q_NV.gather(1, targets_N[:, None])[:, 0]]
    if dense_NV is not None:
        log_p_NV = log_softmax(dense_NV.float(), -1)
        rows.append(-log_p_NV.gather(1, targets_N[:, None])[:, 0])
        same_N = log_p_NV.max(-1).indices == log_q_NV.max(-1).indices
        terms_NV = log_p_NV.exp().mul_(log_p_NV.sub_(log_q_NV))
        terms_NV.nan_to_num_(0.0, torch.inf, -torch.inf)  # 0 log 0 is 0, for tokens that a model rules out
        rows += [terms_NV.sum(-1).clamp_min_(0), same_N]  # below 0 only by rounding
    return torch.stack([row.double() for row in rows], 1)


def _check_same_width(logits_BnV: Tensor, dense_BnV: Tensor | None) -> None:
    if dense_BnV is not None and dense_BnV.shape[-1] != logits_BnV.shape[-1]:
        raise ModelError(
            f"the model has logits for {logits_BnV.shape[-1]} tokens and the dense model for {dense_BnV.shape[-1]}; "
            "compare a model with the dense one it was made from"
        )
