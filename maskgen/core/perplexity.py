"""Perplexity, with its protocol stated; the same windows offline and through a server.

Windows of `window_tokens` tokens are cut every `stride_tokens`; in each, the tokens not yet scored by the window
before are scored, each given all tokens before it in the window. The result is `exp(mean over windows of the window's
mean negative log-likelihood)`. The default (stride = window) is the non-overlapping protocol of the pruning literature:
every window scores its last `window_tokens - 1` tokens and a trailing partial window is dropped. With `bos`, a
beginning-of-sequence token is put in front of each window (inside `window_tokens`), so its first text token counts.

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
    """How text becomes windows. `stride_tokens=None` means non-overlapping; `max_windows=None` means all."""

    window_tokens: int = 2048
    stride_tokens: int | None = None
    bos: bool = False
    max_windows: int | None = None

    def __post_init__(self) -> None:
        if self.window_tokens < 2:
            raise DataError(f"window {self.window_tokens}: expected at least 2 tokens")
        if not 1 <= self.stride <= self.window_tokens:
            raise DataError(f"stride {self.stride}: expected 1 to {self.window_tokens} (the window)")
        if self.bos and self.stride != self.window_tokens:
            raise DataError("bos together with a stride shorter than the window is not defined; drop one of them")
        if self.max_windows is not None and self.max_windows < 1:
            raise DataError(f"max_windows {self.max_windows}: expected at least 1")

    @property
    def stride(self) -> int:
        """Tokens between the starts of two windows."""
        return self.window_tokens if self.stride_tokens is None else self.stride_tokens

    def windows(self, ids: Sequence[int], bos_id: int | None = None) -> list[Window]:
        """Cut token ids into windows. `DataError` when there is not one whole window, or no `bos_id` with `bos`."""
        if self.bos and bos_id is None:
            raise DataError("bos asked for, but the tokenizer has no beginning-of-sequence token")
        prefix = [bos_id] if self.bos and bos_id is not None else []
        length = self.window_tokens - len(prefix)
        step = length if prefix else self.stride
        starts = range(0, len(ids) - length + 1, step)[: self.max_windows]
        if not starts:
            raise DataError(f"text of {len(ids)} tokens: shorter than one window of {self.window_tokens}")
        overlap = self.window_tokens - self.stride
        return [Window([*prefix, *ids[start : start + length]], max(1, overlap if start else 0)) for start in starts]

    def describe(self) -> str:
        """One line for people."""
        kind = "non-overlapping" if self.stride == self.window_tokens else f"stride {self.stride}"
        limit = "all windows" if self.max_windows is None else f"first {self.max_windows} windows"
        return f"window {self.window_tokens}, {kind}, {'BOS in each' if self.bos else 'no BOS'}, {limit}"


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


def digest_windows(windows: Sequence[Window]) -> str:
    """Digest of the exact tokens scored; two measurements are paired only if theirs are equal."""
    lengths = np.array([[len(window.ids), window.first_scored] for window in windows], dtype="<i8")
    tokens = np.concatenate([np.array(window.ids, dtype="<i8") for window in windows])
    return digest_bytes(lengths.tobytes() + tokens.tobytes())
