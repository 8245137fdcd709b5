"""Clients that stream over HTTP and gRPC, again and again, and take note of what became of every request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from sparse_serve.client import AsyncClient
from tests.vllm.serving import PROMPT, until

TOKENS = 96
RETRY_S = 0.1


@dataclass(frozen=True)
class Answer:
    """What one request got. `lost` says what went wrong after it had begun to be answered, or with every attempt."""

    api: str
    began_s: float
    text: str = ""
    lost: str = ""


@dataclass
class Streams:
    """`each` clients of each API, in a thread of their own. `retried` attempts had got no answer at all."""

    http: str
    grpc: str
    each: int
    answers: list[Answer] = field(default_factory=list)
    retried: int = 0
    active: int = 0
    """Clients that ask, of each API; the others pause once they have their answers. 0: all."""

    def __enter__(self) -> Streams:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def wait_for_answers(self, limit_s: float = 120.0) -> None:
        """Until every client has got one more, to a request made from now on."""
        now_s = time.monotonic()
        until(lambda: sum(answer.began_s > now_s for answer in self.answers) >= 2 * self.each, limit_s)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self.each)
        async with (
            httpx.AsyncClient(base_url=self.http, timeout=120, trust_env=False, limits=limits) as http,
            AsyncClient(self.grpc) as grpc,
        ):
            clients = [self._client(number, "http", self._over_http, http) for number in range(self.each)]
            clients += [self._client(number, "grpc", self._over_grpc, grpc) for number in range(self.each)]
            await asyncio.gather(*clients)

    async def _client(self, number: int, api: str, ask: Any, connection: Any) -> None:
        while not self._stopping.is_set():
            if number >= (self.active or self.each):
                await asyncio.sleep(RETRY_S)
                continue
            began_s = time.monotonic()
            try:
                answer = Answer(api, began_s, await ask(connection))
            except Exception as error:
                answer = Answer(api, began_s, lost=f"{type(error).__name__}: {error}")
            self.answers.append(answer)

    async def _over_http(self, client: httpx.AsyncClient) -> str:
        body: dict[str, Any] = {"model": "model", "prompt": PROMPT, "max_tokens": TOKENS, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        while True:
            text, finished, begun = "", "", False
            try:
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    begun = True
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            (choice,) = json.loads(line[6:])["choices"]
                            text, finished = text + choice["text"], choice["finish_reason"] or finished
            except httpx.TransportError:
                # an idle connection that was closed while it was taken for this request
                if begun:
                    raise
                self.retried += 1
                await asyncio.sleep(RETRY_S)
                continue
            assert (response.status_code, finished) == (200, "length")
            return text

    async def _over_grpc(self, client: AsyncClient) -> str:
        pieces = client.stream(PROMPT, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        whole = [piece async for piece in pieces]
        assert whole[-1].finish_reason
        return "".join(piece.text for piece in whole)
