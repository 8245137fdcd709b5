"""A text's tokens with their log-probabilities, and the two forms in which completions have them.

vLLM's `prompt_logprobs` name tokens by id; OpenAI's older `echo` with `logprobs` names them by text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_LOGPROB = 1e-3
"""Rounding may lift a log-probability this far above zero."""

MIN_LOGPROB = -500.0
"""Below it stands a number that means none, as llama.cpp's least float for a probability that underflows."""


@dataclass(frozen=True)
class ScoredText:
    """A text's tokens, the log-probability of each but the first, and at each of these the most likely tokens.

    `ids` are None where the server names tokens by text only. `top` maps a token (its id, else its text) to its
    log-probability. `names` are the texts of ids in `top`, as far as the server says them.
    """

    ids: tuple[int, ...] | None
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    top: tuple[Mapping[int | str, float], ...]
    names: Mapping[int, str] = field(default_factory=dict)

    def problem(self) -> str | None:
        """Why these are no log-probabilities of a text, if they are not."""
        numbers = [*self.logprobs, *(value for top in self.top for value in top.values())]
        bad = next((value for value in numbers if not MIN_LOGPROB <= value <= MAX_LOGPROB), None)
        if bad is not None:
            return f"a log-probability in its answer is {bad}"
        for at, (logprob, top) in enumerate(zip(self.logprobs, self.top, strict=True), 1):
            if not top or math.fsum(map(math.exp, top.values())) > 1.01 or logprob > max(top.values()) + MAX_LOGPROB:
                return f"its answer has log-probabilities of token {at} that are none of one distribution"
        return None

    def top_by_text(self) -> list[Mapping[int | str, float]]:
        """`top` with tokens named by text, those of one text together. `KeyError` for an id without a text."""
        if self.ids is None:
            return list(self.top)
        found: list[Mapping[int | str, float]] = []
        for top in self.top:
            shares: dict[int | str, float] = {}
            for token, logprob in top.items():
                name = self.names[int(token)]
                shares[name] = shares.get(name, 0.0) + math.exp(logprob)
            found.append({name: math.log(share) if share else MIN_LOGPROB for name, share in shares.items()})
        return found


def from_ids(choice: Mapping[str, Any]) -> ScoredText | None:
    """vLLM's form: an entry for each token, null for the first, else the token and the most likely ones by id.

    None if it is incomplete.
    """
    entries, ids = choice["prompt_logprobs"], choice.get("prompt_token_ids")
    try:
        tops: list[dict[int | str, float]] = [
            {int(key): float(value["logprob"]) for key, value in entry.items()} for entry in entries[1:]
        ]
        names = {int(key): str(value.get("decoded_token")) for entry in entries[1:] for key, value in entry.items()}
        if ids is None or len(ids) != len(entries):
            return None
        logprobs = tuple(top[token] for top, token in zip(tops, ids[1:], strict=True))
        return ScoredText(tuple(ids), ("", *(names[token] for token in ids[1:])), logprobs, tuple(tops), names)
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def is_echo(choice: Mapping[str, Any]) -> bool:
    """Whether an answer has more than the token it generated, in OpenAI's form."""
    found = choice.get("logprobs")
    tokens = found.get("tokens") if isinstance(found, dict) else None
    return isinstance(tokens, list) and len(tokens) > 1


def from_echo(choice: Mapping[str, Any]) -> ScoredText | None:
    """OpenAI's form: tokens as text, with log-probability and most likely ones; the last token is generated.

    None if it is incomplete.
    """
    found = choice["logprobs"]
    try:
        tokens: Sequence[str] = [str(token) for token in found["tokens"]][:-1]
        logprobs = [float(value) for value in found["token_logprobs"][1 : len(tokens)]]
        tops: list[dict[int | str, float]] = [
            {str(key): float(value) for key, value in top.items()} for top in found["top_logprobs"][1 : len(tokens)]
        ]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    if not len(logprobs) == len(tops) == len(tokens) - 1:
        return None
    return ScoredText(None, tuple(tokens), tuple(logprobs), tuple(tops))
