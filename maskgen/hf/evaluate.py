"""Perplexity of a Hugging Face model, dense or sparse, under a stated protocol.

The windows and the averaging are `maskgen.core.perplexity`'s, shared with the serving side, so that offline and
served results are about the same tokens. Models run in the dtype they were loaded in; log-probabilities
are always float32, taken in slices of tokens so that no `[B, T, V]` float32 tensor is ever made beside the logits.

Legend: B = batch, T = tokens, V = vocabulary, N = scored tokens of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from maskgen.core.errors import DataError, NumericalError
from maskgen.core.perplexity import Perplexity, Protocol, Window, digest_windows

_SLICE_BYTES = 64 << 20


@torch.no_grad()
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
    if batch < 1:
        raise DataError(f"batch {batch}: expected at least 1 window")
    windows = protocol.windows(ids, bos_ids)
    nll: list[float] = []
    for group in _batches(windows, batch):
        nll += _score(model, group)
        if progress is not None:
            progress(len(nll), len(windows))
    return Perplexity(
        protocol=protocol,
        nll_per_window=nll,
        scored_tokens_per_window=[len(window.ids) - window.first_scored for window in windows],
        tokens_digest=digest_windows(windows),
    )


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


def _score(model: nn.Module, windows: list[Window]) -> list[float]:
    """Mean negative log-likelihood of the scored tokens of each window."""
    device = next(model.parameters()).device
    ids_BT = torch.tensor([window.ids for window in windows], device=device)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    means = []
    for window, ids_T, logits_TV in zip(windows, ids_BT, logits_BTV, strict=True):
        first = window.first_scored
        mean = float(_nll(logits_TV[first - 1 : -1], ids_T[first:]).mean())
        if not math.isfinite(mean):
            raise NumericalError(f"the model's loss is {mean}; check its weights, or evaluate with `dtype` float32")
        means.append(mean)
    return means


def _nll(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Float64 negative log-likelihood of each target; log-probabilities in float32, a slice of tokens at a time."""
    rows = max(1, _SLICE_BYTES // (4 * logits_TV.shape[-1]))
    parts = [
        nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none").double()
        for logits_NV, targets_N in zip(logits_TV.split(rows), targets_T.split(rows), strict=True)
    ]
    return torch.cat(parts)
