"""Perplexity, with its protocol stated; the same windows offline and through a server.

Windows of `window_tokens` tokens are cut every `stride_tokens`; in each, the tokens not yet scored by the window
before are scored, each given all tokens before it in the window. The result is `exp(mean over windows of the window's
mean negative log-likelihood)`. The default (stride = window) is the non-overlapping protocol of the pruning literature:
every window scores its last `window_tokens - 1` tokens and a trailing partial window is dropped. With `bos`, what the
model expects at the beginning of a sequence is put in front of each window (inside `window_tokens`), so its first text
token counts; windows that do not overlap are then cut every `window_tokens` less those.

The protocol changes the number more than most pruning methods do, so it travels with every result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from maskgen.core.digest import digest_bytes
from maskgen.core.errors import DataError


@dataclass(frozen=True)
class Window:
    """Token ids of one window; log-probabilities count from index `first_scored` (>= 1) on."""

    ids: list[int]
    first_scored: int


@dataclass(frozen=True)
class Protocol:
    """How text becomes windows. `stride_tokens=None` means non-overlapping; `max_windows=None` means all.

    `own_bos` is for people: whether the model's tokenizer puts BOS in front of a text by itself (None: not known).
    """

    window_tokens: int = 2048
    stride_tokens: int | None = None
    bos: bool = False
    max_windows: int | None = None
    own_bos: bool | None = None

    def __post_init__(self) -> None:
        if self.window_tokens < 2:
            raise DataError(f"window {self.window_tokens}: expected at least 2 tokens")
        if not 1 <= self.stride <= self.window_tokens:
            raise DataError(f"stride {self.stride}: expected 1 to {self.window_tokens} (the window)")
        if self.max_windows is not None and self.max_windows < 1:
            raise DataError(f"max_windows {self.max_windows}: expected at least 1")

    @property
    def stride(self) -> int:
        """Tokens of text between the starts of two windows, for windows without BOS."""
        return self.window_tokens if self.stride_tokens is None else self.stride_tokens

    def windows(self, ids: Sequence[int], bos_ids: Sequence[int] = ()) -> list[Window]:
        """Cut token ids into windows, each with `bos_ids` in front if `bos`.

        `DataError` when there is not one whole window, and when there are no `bos_ids` to put in front.
        """
        if self.bos and not bos_ids:
            raise DataError("bos asked for, but the tokenizer has no beginning-of-sequence token")
        prefix = list(bos_ids) if self.bos else []
        length = self.window_tokens - len(prefix)
        if length < 1:
            raise DataError(f"window {self.window_tokens}: no room for text after BOS")
        step = min(self.stride, length)
        starts = range(0, len(ids) - length + 1, step)[: self.max_windows]
        if not starts:
            raise DataError(
                f"text of {len(ids)} tokens: shorter than one window of {self.window_tokens}; give more text, or lower "
                "`window_tokens`"
            )
        first, later = max(1, len(prefix)), max(1, len(prefix) + length - step)
        return [Window([*prefix, *ids[start : start + length]], later if start else first) for start in starts]

    def describe(self) -> str:
        """One line for people."""
        kind = "non-overlapping" if self.stride == self.window_tokens else f"stride {self.stride}"
        limit = "all windows" if self.max_windows is None else f"first {self.max_windows} windows"
        return f"window {self.window_tokens}, {kind}, {describe_bos(self.bos, self.own_bos)}, {limit}"


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity with every window's mean negative log-likelihood (nats per token)."""

    protocol: Protocol
    nll_per_window: list[float]
    scored_tokens_per_window: list[int]
    tokens_digest: str

    @property
    def value(self) -> float:
        """`exp(mean of nll_per_window)`."""
        return math.exp(math.fsum(self.nll_per_window) / len(self.nll_per_window))

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {**asdict(self), "perplexity": self.value}


def describe_bos(bos: bool, own: bool | None) -> str:
    """For people: whether windows begin with BOS, and whether that is what the tokenizer does by itself (`own`)."""
    what = "BOS in each" if bos else "no BOS"
    if own is None:
        return what
    if own == bos:
        return f"{what} (as the tokenizer does by itself)"
    return f"{what} (the tokenizer puts {'one' if own else 'none'} there by itself)"


def digest_windows(windows: Sequence[Window]) -> str:
    """Digest of the exact tokens scored; two measurements are paired only if theirs are equal."""
    lengths = np.array([[len(window.ids), window.first_scored] for window in windows], dtype="<i8")
    tokens = np.concatenate([np.array(window.ids, dtype="<i8") for window in windows])
    return digest_bytes(lengths.tobytes() + tokens.tobytes())
