"""Scoring text through two servers, in pieces that each tokenises itself; the tokens have to be the same.

KL divergence is that of two coarser distributions: the base's most likely tokens that the candidate names too, and all
others together as one. Merging outcomes can only make a divergence smaller (the data processing inequality), so it is a
lower bound of the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from maskgen.core.digest import digest_bytes
from maskgen.core.divergence import Divergence
from maskgen.core.errors import clip
from maskgen.core.perplexity import Perplexity, Protocol
from sparse_serve.gate.endpoint import Endpoint
from sparse_serve.gate.evidence import Scores, TextEvidence
from sparse_serve.gate.scored_text import ScoredText
from sparse_serve.runtime.errors import GateError, SettingsError

CHARACTERS_PER_TOKEN = 3
_SHOWN_TOKENS = 6
_LEAST = 1e-12
"""The least probability of a merged outcome: rounding leaves less, or none."""


def pieces(text: str, characters: int, most: int | None) -> list[str]:
    """Cut `text` at white space into pieces of at most `characters`; the last, shorter one is dropped if others are."""
    found: list[str] = []
    at = 0
    while len(text) - at > characters and (most is None or len(found) < most):
        end = max(text.rfind(space, at + 1, at + characters + 1) for space in " \n")
        end = at + characters if end <= at else end
        found.append(text[at:end])
        at = end
    return found or [text][:most]


def read_pieces(path: Path, window_tokens: int, most: int | None) -> list[str]:
    """The pieces of a plain UTF-8 text. `SettingsError` for what is none, or empty."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"data {path}: is no plain text: {error}") from None
    if not text.strip():
        raise SettingsError(f"data {path}: is empty")
    return pieces(text, CHARACTERS_PER_TOKEN * window_tokens, most)


def measure(
    name: str, texts: list[str], base: Endpoint, candidate: Endpoint, top_k: int, on_target: Callable[[str], None]
) -> TextEvidence:
    """Score every piece of the text called `name` with both. Raises `GateError`, also for different tokens."""
    on_target(f"{name}: {len(texts)} pieces, base")
    by_base = by_candidate = base.score_all(texts, top_k)
    if not base.is_same(candidate):  # a recording has one target
        on_target(f"{name}: {len(texts)} pieces, candidate")
        by_candidate = candidate.score_all(texts, top_k)
    pairs = list(zip(by_base, by_candidate, strict=True))
    for at, pair in enumerate(pairs):
        _check_same(name, at, *pair)
    scored = [len(left.logprobs) for left, _ in pairs]
    protocol = Protocol(window_tokens=max(scored) + 1, max_windows=len(pairs))
    digest = digest_bytes("\n".join(repr(left.ids or left.tokens) for left, _ in pairs).encode("utf-8"))

    def scores(side: int) -> Scores:
        nll = [-math.fsum(pair[side].logprobs) / len(pair[side].logprobs) for pair in pairs]
        return Scores(Perplexity(protocol, nll, scored, digest))

    found = [_divergence(left, right) for left, right in pairs]
    divergence = Divergence([kl for kl, _ in found], [agreement for _, agreement in found], scored)
    return TextEvidence(name, scores(0), scores(1), divergence, is_exact=False)


def _check_same(name: str, at: int, base: ScoredText, candidate: ScoredText) -> None:
    """`GateError` if the two have other tokens: by id, or by text where one of them says no ids."""
    left: Sequence[int | str] = base.tokens[1:] if base.ids is None or candidate.ids is None else base.ids
    right: Sequence[int | str] = candidate.tokens[1:] if base.ids is None or candidate.ids is None else candidate.ids
    if left == right:
        return
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    first = same + len(base.tokens) - len(left)
    differing = " and ".join(clip("".join(one.tokens[first:][:_SHOWN_TOKENS])) for one in (base, candidate))
    raise GateError(
        f"{name}: the two targets make different tokens of piece {at}, from token {first} on ({differing}; "
        f"{len(base.tokens)} and {len(candidate.tokens)} tokens in all); log-probabilities per token cannot be compared"
    )


def _divergence(base: ScoredText, candidate: ScoredText) -> tuple[float, float]:
    """Mean KL divergence, and share of positions with the same most likely token."""
    kl = agreed = 0.0
    is_by_id = base.ids is not None and candidate.ids is not None
    tops = (base.top, candidate.top) if is_by_id else (base.top_by_text(), candidate.top_by_text())
    for left, right in zip(*tops, strict=True):
        kl += merged_kl(left, right)
        agreed += max(left, key=left.__getitem__) == max(right, key=right.__getitem__)
    return kl / len(base.top), agreed / len(base.top)


def merged_kl(base: Mapping[int | str, float], candidate: Mapping[int | str, float]) -> float:
    """KL divergence of the merged distributions, by log-probability: no larger than the true one."""
    shared = [(base[token], candidate[token]) for token in base.keys() & candidate.keys()]
    left = max(1 - math.fsum(math.exp(p) for p, _ in shared), _LEAST)
    right = max(1 - math.fsum(math.exp(q) for _, q in shared), _LEAST)
    return max(math.fsum(math.exp(p) * (p - q) for p, q in shared) + left * math.log(left / right), 0.0)
