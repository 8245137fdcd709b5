"""How far a model's predictions are from the dense model's, token by token over the same text.

Perplexity looks only at the probability of the token that is there: a model may lose what it knew in one place and win
by luck in another, and have the same perplexity. These two look at the whole distribution of the next token, p of the
dense model and q of the model measured, at every scored position:

    KL divergence      KL(p || q) = sum over the vocabulary of p (log p - log q), in nats; 0 where both are the same
    top-1 agreement    whether p and q have their highest probability at the same token

Both are means over all scored tokens. Source: Dutta et al., "Accuracy is not all you need" (NeurIPS 2024), which finds
that divergence tells compressed models apart where accuracy and perplexity do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Divergence:
    """KL divergence (nats per token) and top-1 agreement (0 to 1) of every window, means over its scored tokens."""

    kl_per_window: list[float]
    agreement_per_window: list[float]
    scored_tokens_per_window: list[int]

    @property
    def kl(self) -> float:
        """Mean KL(dense || model) over all scored tokens, in nats."""
        return self._mean(self.kl_per_window)

    @property
    def agreement(self) -> float:
        """Share of all scored positions at which both models find the same token the most likely one."""
        return self._mean(self.agreement_per_window)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {**asdict(self), "kl": self.kl, "agreement": self.agreement}

    def _mean(self, per_window: Sequence[float]) -> float:
        counts = self.scored_tokens_per_window
        return math.fsum(value * count for value, count in zip(per_window, counts, strict=True)) / sum(counts)
