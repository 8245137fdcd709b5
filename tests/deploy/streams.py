"""Clients that stream over HTTP and gRPC, again and again, and take note of what became of every request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from sparse_serve.client import AsyncClient
from tests.vllm.serving import PROMPT, until

RETRY_S = 0.2
ATTEMPTS = 500


class Refused(Exception):
    """A status other than 200, an error in place of an event, or a stream that ends too early."""


@dataclass(frozen=True)
class Answer:
    """What one request got. `lost` says what went wrong after it had begun to be answered, or with every attempt."""

    api: str
    tokens: int
    began_s: float
    text: str = ""
    lost: str = ""


@dataclass
class Streams:
    """Clients of each API, one for each number of tokens in `lengths`, in a thread of their own; of HTTP only without a
    gRPC address.

    `retried` says of attempts over HTTP that had got no token why they were made again. gRPC's are its own matter.
    """

    http: str
    grpc: str
    lengths: Sequence[int]
    answers: list[Answer] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    active: int = 0
    """Clients that ask, of each API, the first ones; the others pause once they have their answers. 0: all."""
    pause_s: float = 0.0
    """Between an answer and a client's next request."""

    def __enter__(self) -> Streams:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def wait_for_answers(self, limit_s: float = 120.0) -> None:
        """Until there are as many more as there are clients, to requests made from now on."""
        now_s, apis = time.monotonic(), 2 if self.grpc else 1
        until(lambda: sum(answer.began_s > now_s for answer in self.answers) >= apis * len(self.lengths), limit_s)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=len(self.lengths))
        async with httpx.AsyncClient(base_url=self.http, timeout=300, trust_env=False, limits=limits) as http:
            clients = [self._client(number, "http", self._over_http, http) for number in range(len(self.lengths))]
            if not self.grpc:
                await asyncio.gather(*clients)
                return
            async with AsyncClient(self.grpc) as grpc:
                clients += [self._client(number, "grpc", self._over_grpc, grpc) for number in range(len(self.lengths))]
                await asyncio.gather(*clients)

    async def _client(self, number: int, api: str, ask: Any, connection: Any) -> None:
        tokens = self.lengths[number]
        while not self._stopping.is_set():
            if number >= (self.active or len(self.lengths)):
                await asyncio.sleep(RETRY_S)
                continue
            began_s = time.monotonic()
            try:
                answer = Answer(api, tokens, began_s, await ask(connection, tokens))
            except Exception as error:
                answer = Answer(api, tokens, began_s, lost=f"{type(error).__name__}: {error}")
            self.answers.append(answer)
            await asyncio.sleep(self.pause_s)

    async def _over_http(self, client: httpx.AsyncClient, tokens: int) -> str:
        for _ in range(ATTEMPTS):
            texts: list[str] = []
            try:
                await self._read(client, tokens, texts)
                return "".join(texts)
            except (httpx.TransportError, Refused) as error:
                if texts:
                    raise
                self.retried.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(RETRY_S)
        raise Refused("every attempt")

    async def _read(self, client: httpx.AsyncClient, tokens: int, texts: list[str]) -> None:
        body: dict[str, Any] = {"model": "model", "prompt": PROMPT, "max_tokens": tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise Refused(f"status {response.status_code}")
            finished = ""
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "choices" not in event:
                        raise Refused(line)
                    (choice,) = event["choices"]
                    texts.append(choice["text"])
                    finished = choice["finish_reason"] or finished
        if finished != "length":
            raise Refused("the stream ended too early")

    async def _over_grpc(self, client: AsyncClient, tokens: int) -> str:
        pieces = client.stream(PROMPT, max_tokens=tokens, temperature=0.0, ignore_eos=True)
        whole = [piece async for piece in pieces]
        assert whole[-1].finish_reason
        return "".join(piece.text for piece in whole)
