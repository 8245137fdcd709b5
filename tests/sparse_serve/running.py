"""A whole server around a `FakeEngine`, for tests: real sockets, real gRPC, real HTTP, no model.

vLLM's application needs vLLM's engine, so an application of a few lines stands in for it behind the same listener.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace

import grpc
import httpx
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse, PlainTextResponse

from sparse_serve.api import grpc_v1, landing, ops
from sparse_serve.api.pb.v1 import generation_pb2_grpc
from sparse_serve.engine import GenerateRequest, Sampling
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.runtime.errors import EngineDiedError
from sparse_serve.server.context import ServerContext
from sparse_serve.server.lifecycle import Event, Listening, Ready, Server
from sparse_serve.server.settings import Settings


class EchoApi:
    """POST {"prompt", "max_tokens"} streams the engine's tokens; anything else says which path it was.

    With `?sse` the answer is called an event stream. With `?wide` every token is there 10,000 times. With `?late` the
    answer comes when all is there, and is 500 if that fails. `GET` with `?sse` streams tokens without end.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def start(self) -> str:
        return ""

    async def serve(self) -> None:
        self._context.listener.set_main(self._app)

    async def drain(self) -> None: ...

    async def stop(self, grace_s: float) -> None: ...

    async def _app(self, scope, receive, send) -> None:
        if scope["query_string"] == b"late":
            await self._late(receive, send)
            return
        self._times = 10_000 if scope["query_string"] == b"wide" else 1
        headers = [(b"content-type", b"text/event-stream")] if scope["query_string"] == b"sse" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] != "POST" and not headers:
            await send({"type": "http.response.body", "body": scope["path"].encode()})
            return
        received = (await receive())["body"]
        body = json.loads(received) if received else {"prompt": "ab", "max_tokens": 4000}
        generation = asyncio.create_task(self._stream(body, send))
        left = asyncio.create_task(receive())
        try:
            await asyncio.wait({generation, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (generation, left):
                task.cancel()
            await asyncio.gather(generation, left, return_exceptions=True)

    async def _late(self, receive, send) -> None:
        body = json.loads((await receive())["body"])
        request = GenerateRequest(body["prompt"], Sampling(max_tokens=body["max_tokens"]))
        try:
            text = "".join([chunk.text async for chunk in self._context.engine.generate(request)])
        except EngineDiedError:
            await JSONResponse({"error": "see stack trace above"}, 500)({"type": "http"}, receive, send)
        else:
            await PlainTextResponse(text)({"type": "http"}, receive, send)

    async def _stream(self, body, send) -> None:
        request = GenerateRequest(body["prompt"], Sampling(max_tokens=body["max_tokens"]))
        async with contextlib.aclosing(self._context.engine.generate(request)) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk.text.encode() * self._times, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


ECHO = SimpleNamespace(create=EchoApi)


@dataclass
class Running:
    """A running server and clients for it. `task` ends with the exit code."""

    server: Server
    engine: FakeEngine
    registry: CollectorRegistry
    task: "asyncio.Task[int]"
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    events: list[Event]

    @property
    def stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def grpc_address(self) -> str:
        return next(event.grpc for event in self.events if isinstance(event, Listening))

    @property
    def is_ready(self) -> bool:
        return any(isinstance(event, Ready) for event in self.events)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def until(self, condition) -> None:
        """Wait until `condition()`; the test's timeout is the limit."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(engine: FakeEngine | None = None, ready: bool = True, **settings) -> AsyncIterator[Running]:
    """A server on free ports, ready unless told otherwise; stopped at the end."""
    engine = engine or FakeEngine()
    registry, events = CollectorRegistry(), []
    options = Settings(**{"http_port": 0, "grpc_port": 0, "drain_s": 5.0} | settings)
    server = Server(engine, options, [ops, landing, grpc_v1, ECHO], registry, events.append)
    task = asyncio.create_task(server.run())
    wanted = Ready if ready else Listening
    async with asyncio.timeout(60):
        while not any(isinstance(event, wanted) for event in events) and not task.done():
            await asyncio.sleep(0.005)
    if task.done():
        task.result()
    (listening,) = [event for event in events if isinstance(event, Listening)]
    async with (
        httpx.AsyncClient(base_url=f"http://{listening.http}", timeout=60) as http,
        grpc.aio.insecure_channel(listening.grpc) as channel,
    ):
        try:
            yield Running(server, engine, registry, task, http, channel, events)
        finally:  # a server that is left alone keeps threads of gRPC, for which the process waits
            server.stop()
            await asyncio.wait_for(task, 60)
