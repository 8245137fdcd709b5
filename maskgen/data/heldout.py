"""Text that nothing is calibrated on, kept to measure what pruning has cost: the last windows of every text.

At most `WINDOWS` windows of at most `WINDOW_TOKENS` tokens in all, which a CPU scores in seconds, and never more than a
tenth of a text, so that calibration hardly notices. Texts take turns, so that each contributes equally.

Legend: S = windows, T = tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from maskgen.data.bos import Bos

WINDOWS, WINDOW_TOKENS = 16, 512
_SHARE = 10


@dataclass
class HeldOut:
    """Collects the last windows of `texts` texts, `most` in all.

    The model reads at most `limit` tokens (None: any number).
    """

    texts: int
    limit: int | None
    bos: Bos
    most: int = WINDOWS
    names: list[str] = field(default_factory=list)
    _taken: list[Tensor] = field(default_factory=list)
    _seen: int = 0

    @property
    def window_tokens(self) -> int:
        """T, BOS included."""
        return WINDOW_TOKENS if self.limit is None else min(WINDOW_TOKENS, self.limit)

    def take(self, source: Path | str, ids: Tensor, needed: int = 0) -> Tensor:
        """Keep the windows at the end of a text's token ids, and return the ids before them, at least `needed`."""
        length = self.bos.text_tokens(self.window_tokens)
        share = len(range(self._seen, self.most, self.texts))
        self._seen += 1
        count = max(0, min(share, len(ids) // (_SHARE * length), (len(ids) - needed) // length))
        if count == 0:
            return ids
        self.names.append(Path(source).name)
        self._taken.append(ids[len(ids) - count * length :].view(count, length).clone())
        return ids[: len(ids) - count * length]

    def windows(self) -> Tensor | None:
        """All windows that were kept, int64 `[S, T]`, each with BOS in front; None if every text was too short."""
        return self.bos.before(torch.cat(self._taken).long()) if self._taken else None
