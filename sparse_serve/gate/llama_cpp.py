"""llama.cpp's server, which returns no log-probabilities of a prompt: it takes `echo` and leaves it out of its answer.

So a text is generated instead of read. `/tokenize` names its tokens, `/completion` starts from the first of them, and a
grammar allows only the next token of the text at each position. With `n_probs` the answer has the log-probability of
every token that was generated, by the softmax of its logits before any sampler or grammar, so they are those of the
text as a prompt. A text costs as many steps as it has tokens.

A token that ends within a character does not show among generated ones. It is looked up among the probabilities of the
whole vocabulary instead, some megabytes for each such token.

Source: llama.cpp, tools/server/README.md (`n_probs`) and grammars/README.md (tokens); observed with build 11549.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sparse_serve.gate.scored_text import ScoredText

Post = Callable[[str, dict[str, Any]], dict[str, Any]]
"""From a path and a body to an answer; raises `GateError`."""

_WHOLE_VOCABULARY = 1 << 24


@dataclass(frozen=True)
class Token:
    """`piece` is its text, None where it begins or ends within a character."""

    id: int
    piece: str | None


def tokenize(post: Post, text: str) -> list[Token] | None:
    """A text's tokens; None where the answer is no llama.cpp's. Raises what `post` raises."""
    asked = {"content": text, "add_special": True, "parse_special": True, "with_pieces": True}
    try:
        return [_token(entry) for entry in post("/tokenize", asked)["tokens"]]
    except (TypeError, KeyError, ValueError):
        return None


def score(post: Post, tokens: Sequence[Token], top_k: int) -> ScoredText | None:
    """Score tokens with the `top_k` most likely ones at every position; None where some were not generated.

    Raises what `post` raises.
    """
    try:
        found = [entry for part in _parts(tokens) for entry in _generate(post, tokens, *part, top_k)]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    if [id_ for id_, _, _ in found] != [token.id for token in tokens[1:]]:
        return None
    names = {id_: name for _, _, top in found for id_, (name, _) in top.items()}
    return ScoredText(
        tuple(token.id for token in tokens),
        ("", *(token.piece or "" for token in tokens[1:])),
        tuple(logprob for _, logprob, _ in found),
        tuple({id_: logprob for id_, (_, logprob) in top.items()} for _, _, top in found),
        names,
    )


def _token(entry: dict[str, Any]) -> Token:
    piece = entry["piece"]
    return Token(int(entry["id"]), piece if isinstance(piece, str) else None)


def _parts(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of what is generated at once, from the second token on: runs of whole ones, others singly."""
    at = 1
    for is_whole, run in groupby(tokens[1:], lambda token: token.piece is not None):
        count = len(list(run))
        ends = [at + count] if is_whole else range(at + 1, at + count + 1)
        for end in ends:
            yield at, end
            at = end


_Found = tuple[int, float, dict[int, tuple[str, float]]]
"""A token's id, its log-probability, and the most likely ones by id, each with its text and log-probability."""


def _generate(post: Post, tokens: Sequence[Token], first: int, end: int, top_k: int) -> Iterator[_Found]:
    """Have the server generate tokens `first` to `end` of a text."""
    is_whole = tokens[first].piece is not None
    # one that would show, for the answer to have an entry at all
    shown = next((token for token in tokens if token.piece), tokens[first])
    wanted = tokens[first:end] if is_whole else [shown]
    asked = {
        "prompt": [token.id for token in tokens[:first]],
        "n_predict": len(wanted),
        "n_probs": top_k if is_whole else _WHOLE_VOCABULARY,
        "grammar": "root ::= " + " ".join(f"<[{token.id}]>" for token in wanted),
        "temperature": 0,
        "cache_prompt": False,
    }
    for token, entry in zip(tokens[first:end], post("/completion", asked)["completion_probabilities"], strict=True):
        top = {int(one["id"]): (str(one["token"]), float(one["logprob"])) for one in entry["top_logprobs"]}
        if is_whole:
            chosen = int(entry["id"]), (str(entry["token"]), float(entry["logprob"]))
        else:
            chosen = token.id, top[token.id]
            top = dict(list(top.items())[:top_k])  # the most likely come first
        yield chosen[0], chosen[1][1], dict([*top.items(), chosen])
