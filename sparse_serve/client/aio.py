"""The client for asyncio. See `sparse_serve.client`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, Unpack

import grpc

from sparse_serve.api.pb.v1 import chat_pb2, chat_pb2_grpc, generation_pb2_grpc, tokens_pb2, tokens_pb2_grpc
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.client import requests
from sparse_serve.client.connection import CallError, Connection, Tls


class AsyncClient:
    """A channel to one server. Close it, or use it in `async with`.

    Every call takes `timeout_s`, the seconds after which it is given up and the server told so, and raises `CallError`.
    Ending the iteration of a stream, or cancelling the task, cancels its call.
    """

    def __init__(
        self,
        address: str,
        *,
        key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = 300.0,
        attempts: int = 4,
    ) -> None:
        self.connection = Connection(address, key, tls, timeout_s, attempts)
        options = self.connection.options
        if tls is None:
            self.channel = grpc.aio.insecure_channel(address, options)
        else:
            self.channel = grpc.aio.secure_channel(address, tls.credentials(), options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self._chat = chat_pb2_grpc.ChatServiceStub(self.channel)
        self._tokens = tokens_pb2_grpc.TokenServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the channel and every call on it."""
        await self.channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling: Unpack[requests.Sampling],
    ) -> pb.GenerateResponse:
        """Continue a text, or token ids, and answer when all is there."""
        request = requests.generation(pb.GenerateRequest, prompt, model, priority, sampling)
        answer: pb.GenerateResponse = await self._once(self._generation.Generate, request, timeout_s)
        return answer

    async def stream(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling: Unpack[requests.Sampling],
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Continue a text, or token ids, piece by piece."""
        request = requests.generation(pb.GenerateStreamRequest, prompt, model, priority, sampling)
        async for piece in self._pieces(self._generation.GenerateStream, request, timeout_s):
            yield piece

    async def chat(
        self,
        messages: Sequence[requests.Message],
        *,
        tools: Sequence[requests.Tool] = (),
        tool_choice: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[requests.Sampling],
    ) -> chat_pb2.ChatResponse:
        """Continue a conversation and answer when all is there."""
        request = requests.chat(chat_pb2.ChatRequest, messages, tools, tool_choice, model, sampling)
        answer: chat_pb2.ChatResponse = await self._once(self._chat.Chat, request, timeout_s)
        return answer

    async def chat_stream(
        self,
        messages: Sequence[requests.Message],
        *,
        tools: Sequence[requests.Tool] = (),
        tool_choice: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[requests.Sampling],
    ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
        """Continue a conversation piece by piece."""
        request = requests.chat(chat_pb2.ChatStreamRequest, messages, tools, tool_choice, model, sampling)
        async for piece in self._pieces(self._chat.ChatStream, request, timeout_s):
            yield piece

    async def score(
        self, passages: Sequence[str | Sequence[int]], *, model: str = "", timeout_s: float | None = None
    ) -> list[tokens_pb2.Score]:
        """Log-probabilities of texts, or of token ids."""
        answer = await self._once(self._tokens.Score, requests.score(passages, model), timeout_s)
        return list(answer.scores)

    async def embed(
        self, passages: Sequence[str | Sequence[int]], *, model: str = "", timeout_s: float | None = None
    ) -> list[list[float]]:
        """Embeddings of texts, or of token ids; only of a model that makes them (`info().embeds`)."""
        answer = await self._once(self._tokens.Embed, requests.embed(passages, model), timeout_s)
        return [list(embedding.values) for embedding in answer.embeddings]

    async def tokenize(self, text: str, *, special_tokens: bool = True, timeout_s: float | None = None) -> list[int]:
        """The tokens of a text."""
        request = tokens_pb2.TokenizeRequest(text=text, without_special_tokens=not special_tokens)
        return list((await self._once(self._tokens.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, special_tokens: bool = True, timeout_s: float | None = None
    ) -> str:
        """The text of tokens."""
        request = tokens_pb2.DetokenizeRequest(token_ids=token_ids, without_special_tokens=not special_tokens)
        return str((await self._once(self._tokens.Detokenize, request, timeout_s)).text)

    async def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """What may be asked for as `model`."""
        return list((await self._once(self._generation.ListModels, pb.ListModelsRequest(), timeout_s)).models)

    async def info(self, *, timeout_s: float | None = None) -> pb.GetModelInfoResponse:
        """What is served."""
        answer: pb.GetModelInfoResponse = await self._once(
            self._generation.GetModelInfo, pb.GetModelInfoRequest(), timeout_s
        )
        return answer

    async def _once(self, call: Any, request: Any, timeout_s: float | None) -> Any:
        limit_s = timeout_s or self.connection.timeout_s
        try:
            return await call(request, timeout=limit_s, metadata=self.connection.metadata)
        except grpc.aio.AioRpcError as error:
            raise CallError(self.connection.address, error) from None

    async def _pieces(self, call: Any, request: Any, timeout_s: float | None) -> AsyncIterator[Any]:
        limit_s = timeout_s or self.connection.timeout_s
        pieces = call(request, timeout=limit_s, metadata=self.connection.metadata)
        try:
            async for piece in pieces:
                yield piece
        except grpc.aio.AioRpcError as error:
            raise CallError(self.connection.address, error) from None
        finally:
            pieces.cancel()
