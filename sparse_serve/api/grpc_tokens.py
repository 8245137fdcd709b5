"""The service `sparse_serve.v1.TokenService`: log-probabilities and embeddings, and text to tokens and back."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sparse_serve.api.grpc_calls import Answering, Calls
from sparse_serve.api.grpc_messages import check_ids, check_model
from sparse_serve.api.pb.v1 import tokens_pb2 as pb
from sparse_serve.api.pb.v1 import tokens_pb2_grpc
from sparse_serve.engine import Origin
from sparse_serve.runtime.errors import BadRequestError
from sparse_serve.server.body_limits import body_limits

T = TypeVar("T")
SERVICE = pb.DESCRIPTOR.services_by_name["TokenService"].full_name


class TokenService(tokens_pb2_grpc.TokenServiceServicer):
    """The calls of `proto/sparse_serve/v1/tokens.proto`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Score(self, request: pb.ScoreRequest, call: Any) -> pb.ScoreResponse:
        """Passages side by side."""

        async def score(ids: list[int], origin: Origin) -> pb.Score:
            return pb.Score(token_ids=ids, logprobs=await self._calls.context.engine.score(ids, request.model, origin))

        async with self._calls.answering("Score", call) as answering:
            self._calls.context.generating()
            scores = await self._side_by_side(request, answering, score)
        return pb.ScoreResponse(scores=scores)

    async def Embed(self, request: pb.EmbedRequest, call: Any) -> pb.EmbedResponse:
        """Passages side by side."""

        async def embed(ids: list[int], origin: Origin) -> pb.Embedding:
            values = await self._calls.context.engine.embed(ids, request.model, origin)
            return pb.Embedding(values=values, prompt_tokens=len(ids))

        async with self._calls.answering("Embed", call) as answering:
            self._calls.context.embedding()
            embeddings = await self._side_by_side(request, answering, embed)
        return pb.EmbedResponse(embeddings=embeddings)

    async def Tokenize(self, request: pb.TokenizeRequest, call: Any) -> pb.TokenizeResponse:
        """Text to tokens."""
        async with self._calls.answering("Tokenize", call):
            self._calls.context.served()
            with self._calls.share(call, 1):
                ids = await self._calls.context.engine.tokenize(request.text, not request.without_special_tokens)
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Any) -> pb.DetokenizeResponse:
        """Tokens to text."""
        async with self._calls.answering("Detokenize", call):
            check_ids("token_ids", request.token_ids, self._calls.context.served())
            with self._calls.share(call, 1):
                engine = self._calls.context.engine
                text = await engine.detokenize(request.token_ids, not request.without_special_tokens)
        return pb.DetokenizeResponse(text=text)

    async def _side_by_side(
        self,
        request: pb.ScoreRequest | pb.EmbedRequest,
        answering: Answering,
        answer: Callable[[list[int], Origin], Coroutine[Any, Any, T]],
    ) -> list[T]:
        """The answers to all passages; the first that fails ends the others."""
        context = self._calls.context
        check_model(request.model, context.engine.models)
        if not request.passages:
            raise BadRequestError("passages is empty; give one or more", "passages")
        body_limits(context.settings).check_sequences(len(request.passages), 1)

        async def one(passage: pb.Passage) -> T:
            return await answer(await self._ids(passage), answering.origin)

        with self._calls.share(answering.call, len(request.passages)):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(passage)) for passage in request.passages]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ids(self, passage: pb.Passage) -> list[int]:
        context = self._calls.context
        match passage.WhichOneof("form"):
            case "text":
                return await context.engine.tokenize(passage.text, True)
            case "token_ids":
                ids = list(passage.token_ids.ids)
                check_ids("passages", ids, context.served())
                return ids
            case _:
                raise BadRequestError("passages: give text or token_ids in each", "passages")
