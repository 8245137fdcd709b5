"""A running server of OpenAI's completions API: log-probabilities of a prompt's tokens.

Three dialects are spoken, and the first text decides which: vLLM's `prompt_logprobs`, with token ids; OpenAI's older
`echo` with `logprobs`, with tokens as text (`scored_text`); llama.cpp's own API, by which a text is generated
(`llama_cpp`). Anything but a complete answer of finite numbers is a `GateError`: a status other than 200, an answer cut
off, a log-probability that is missing or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from maskgen.core.errors import clip
from sparse_serve.gate import llama_cpp
from sparse_serve.gate.scored_text import ScoredText, from_echo, from_ids, is_echo
from sparse_serve.runtime.errors import GateError

TIMEOUT_S = 600.0
CONCURRENT_TEXTS = 8
KEY_VARIABLE = "OPENAI_API_KEY"


_REFUSALS = {400, 404, 405, 415, 422, 501}
"""Statuses of a server that does not know what it is asked for."""

_INCOMPLETE = "its answer has no log-probabilities of the prompt, or not of all its tokens"


class _RefusedError(GateError):
    """The server does not know what it was asked for, or takes no such request."""


class Endpoint:
    """One server. Use as a context manager. `model`: the name to ask for; None: the first that the server names."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S)
        self._model = model
        self._dialect: Callable[[str, int], ScoredText | None] | None = None

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

    def check_answers(self) -> None:
        """Raise `GateError` if nobody answers at the address, whatever the answer is."""
        self._send("GET", "/v1/models")

    def is_same(self, other: Endpoint) -> bool:
        """Whether the other asks the same server for the same model."""
        return (self.url, self.model) == (other.url, other.model)

    def score(self, text: str, top_k: int) -> ScoredText:
        """Score a text as the server tokenises it, with the `top_k` most likely tokens at every position."""
        if self._dialect is None:
            return self._find_out(text, top_k)
        return self._checked(self._dialect(text, top_k))

    def _find_out(self, text: str, top_k: int) -> ScoredText:
        """Ask in one dialect after the other, until the server understands one."""
        refusals = []
        for dialect in (self._by_ids, self._by_echo, self._by_generating):
            try:
                found = dialect(text, top_k)
            except _RefusedError as error:
                refusals.append(str(error))
                continue
            if found is not None:
                self._dialect = dialect
                return self._checked(found)
        said = f" ({refusals[0]})" if refusals else ""
        raise GateError(
            f"{self.url}: returns no log-probabilities of a prompt{said}: neither by `prompt_logprobs` as vLLM, nor by "
            "`echo` with `logprobs`, nor by /tokenize and /completion as llama.cpp; texts and samples cannot be "
            "scored, only `speed` and tasks of lm_eval that generate can be measured"
        )

    def score_all(self, texts: Sequence[str], top_k: int) -> list[ScoredText]:
        """Score several texts, a few at a time, in their order."""
        if not texts:
            return []
        first = self.score(texts[0], top_k)  # it finds out how to ask
        with ThreadPoolExecutor(self._concurrent_texts()) as pool:
            return [first, *pool.map(lambda text: self.score(text, top_k), texts[1:])]

    def _concurrent_texts(self) -> int:
        """No more than llama.cpp has slots: others would wait for their turn until they time out."""
        if self._dialect != self._by_generating:
            return CONCURRENT_TEXTS
        slots = self._json("GET", "/props").get("total_slots")
        return min(slots, CONCURRENT_TEXTS) if isinstance(slots, int) and slots > 0 else 1

    def _by_ids(self, text: str, top_k: int) -> ScoredText | None:
        choice = self._choice(self._asked(text) | {"prompt_logprobs": top_k, "return_token_ids": True})
        return None if choice.get("prompt_logprobs") is None else self._complete(from_ids(choice))

    def _by_echo(self, text: str, top_k: int) -> ScoredText | None:
        choice = self._choice(self._asked(text) | {"echo": True, "logprobs": top_k})
        return self._complete(from_echo(choice)) if is_echo(choice) else None

    def _by_generating(self, text: str, top_k: int) -> ScoredText | None:
        def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            return self._json("POST", path, {"model": self.model, **body})

        tokens = llama_cpp.tokenize(post, text)
        return None if tokens is None else self._complete(llama_cpp.score(post, tokens, top_k))

    def _asked(self, text: str) -> dict[str, Any]:
        return {"model": self.model, "prompt": text, "temperature": 0, "max_tokens": 1}

    def _complete(self, found: ScoredText | None) -> ScoredText:
        if found is None or len(found.tokens) < 2:
            raise GateError(f"{self.url}: {_INCOMPLETE}")
        return found

    def _checked(self, found: ScoredText | None) -> ScoredText:
        scored = self._complete(found)
        problem = scored.problem()
        if problem is not None:
            raise GateError(f"{self.url}: {problem}")
        return scored

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = self._json("POST", "/v1/completions", body).get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise GateError(f"{self.url}: its answer has no choices")
        return choices[0]

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self._send(method, path, body)
        if answer.status_code != httpx.codes.OK:
            kind = _RefusedError if answer.status_code in _REFUSALS else GateError
            raise kind(f"{self.url}{path}: status {answer.status_code}: {clip(answer.text)}")
        try:
            value = answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise GateError(f"{self.url}{path}: its answer is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise GateError(f"{self.url}{path}: its answer is {clip(value)}; expected an object")
        return value

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise GateError(f"{self.url}{path}: {type(error).__name__}: {error}") from None
