"""A running server of OpenAI's completions API: log-probabilities of a prompt's tokens.

Two dialects are spoken. vLLM's has `prompt_logprobs`, with token ids; OpenAI's older one has `echo` with `logprobs`,
with tokens as text. The first answer decides which: what the server does not return in the one is asked for in the
other. Anything but a complete answer of finite numbers is a `GateError`: a status other than 200, an answer cut off, a
log-probability that is missing or none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from maskgen.core.errors import clip
from sparse_serve.runtime.errors import GateError

TIMEOUT_S = 600.0
CONCURRENT_TEXTS = 8
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class ScoredText:
    """A text's tokens, the log-probability of each but the first, and at each of these the most likely tokens.

    `ids` are None where the server names tokens by text only. `top` maps a token (its id, else its text) to its
    log-probability.
    """

    ids: tuple[int, ...] | None
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    top: tuple[Mapping[int | str, float], ...]


class Endpoint:
    """One server. Use as a context manager. `model`: the name to ask for; None: the first that the server names."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S)
        self._model = model
        self._echoes = False

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    @property
    def model(self) -> str:
        """The name of the model that is asked for."""
        if self._model is None:
            listed = self._json("GET", "/v1/models").get("data")
            name = listed[0].get("id") if isinstance(listed, list) and listed and isinstance(listed[0], dict) else None
            if not isinstance(name, str):
                raise GateError(f"{self.url}: its /v1/models names no model; give its `name`")
            self._model = name
        return self._model

    def is_same(self, other: Endpoint) -> bool:
        """Whether the other asks the same server for the same model."""
        return (self.url, self.model) == (other.url, other.model)

    def score(self, text: str, top_k: int) -> ScoredText:
        """Score a text as the server tokenises it, with the `top_k` most likely tokens at every position."""
        asked: dict[str, Any] = {"model": self.model, "prompt": text, "temperature": 0, "max_tokens": 1}
        if not self._echoes:
            choice = self._choice(asked | {"prompt_logprobs": top_k, "return_token_ids": True})
            if choice.get("prompt_logprobs") is not None:
                return self._checked(_from_ids(choice))
            self._echoes = True
        return self._checked(_from_echo(self._choice(asked | {"echo": True, "logprobs": top_k})))

    def score_all(self, texts: Sequence[str], top_k: int) -> list[ScoredText]:
        """Score several texts, a few at a time, in their order."""
        if not texts:
            return []
        first = self.score(texts[0], top_k)  # it finds out how to ask
        with ThreadPoolExecutor(CONCURRENT_TEXTS) as pool:
            return [first, *pool.map(lambda text: self.score(text, top_k), texts[1:])]

    def _checked(self, found: ScoredText | None) -> ScoredText:
        if found is None or len(found.tokens) < 2:
            raise GateError(f"{self.url}: its answer has no log-probabilities of the prompt, or not of all its tokens")
        numbers = [*found.logprobs, *(value for top in found.top for value in top.values())]
        bad = next((value for value in numbers if not math.isfinite(value) or value > 1e-3), None)
        if bad is not None:
            raise GateError(f"{self.url}: a log-probability in its answer is {bad}")
        return found

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = self._json("POST", "/v1/completions", body).get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise GateError(f"{self.url}: its answer has no choices")
        return choices[0]

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise GateError(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        if answer.status_code != httpx.codes.OK:
            raise GateError(f"{self.url}{path}: status {answer.status_code}: {clip(answer.text)}")
        try:
            value = answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise GateError(f"{self.url}{path}: its answer is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise GateError(f"{self.url}{path}: its answer is {clip(value)}; expected an object")
        return value


def _from_ids(choice: Mapping[str, Any]) -> ScoredText | None:
    """vLLM's form: an entry for each token, null for the first, else the token and the most likely ones by id."""
    entries, ids = choice["prompt_logprobs"], choice.get("prompt_token_ids")
    try:
        tops: list[dict[int | str, float]] = [
            {int(key): float(value["logprob"]) for key, value in entry.items()} for entry in entries[1:]
        ]
        names = [{int(key): str(value.get("decoded_token")) for key, value in entry.items()} for entry in entries[1:]]
        if ids is None or len(ids) != len(entries):
            return None
        logprobs = tuple(top[token] for top, token in zip(tops, ids[1:], strict=True))
        tokens = ("", *(name[token] for name, token in zip(names, ids[1:], strict=True)))
        return ScoredText(tuple(ids), tokens, logprobs, tuple(tops))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _from_echo(choice: Mapping[str, Any]) -> ScoredText | None:
    """OpenAI's form: tokens as text, with log-probability and most likely ones; the last token is generated."""
    found = choice.get("logprobs")
    try:
        tokens: Sequence[str] = [str(token) for token in found["tokens"]][:-1]  # type: ignore[index]
        logprobs = [float(value) for value in found["token_logprobs"][1 : len(tokens)]]  # type: ignore[index]
        tops: list[dict[int | str, float]] = [
            {str(key): float(value) for key, value in top.items()}
            for top in found["top_logprobs"][1 : len(tokens)]  # type: ignore[index]
        ]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    if not len(logprobs) == len(tops) == len(tokens) - 1:
        return None
    return ScoredText(None, tuple(tokens), tuple(logprobs), tuple(tops))
