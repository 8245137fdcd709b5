"""The service `sparse_serve.v1.TokenService`: log-probabilities of given tokens, and text to tokens and back."""

import asyncio
from typing import Any

from sparse_serve.api.grpc_calls import Calls
from sparse_serve.api.grpc_messages import check_ids, check_model
from sparse_serve.api.pb.v1 import tokens_pb2 as pb
from sparse_serve.api.pb.v1 import tokens_pb2_grpc
from sparse_serve.engine import Origin
from sparse_serve.runtime.errors import BadRequestError
from sparse_serve.server.body_limits import body_limits

SERVICE = pb.DESCRIPTOR.services_by_name["TokenService"].full_name


class TokenService(tokens_pb2_grpc.TokenServiceServicer):
    """The calls of `proto/sparse_serve/v1/tokens.proto`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Score(self, request: pb.ScoreRequest, call: Any) -> pb.ScoreResponse:
        """Passages side by side."""
        async with self._calls.answering("Score", call) as answering:
            context = self._calls.context
            context.served()
            check_model(request.model, context.engine.models)
            if not request.passages:
                raise BadRequestError("passages is empty; give one or more", "passages")
            body_limits(context.settings).check_sequences(len(request.passages), 1)
            with self._calls.share(call, len(request.passages)):
                scores = await self._scores(request, answering.origin)
        return pb.ScoreResponse(scores=scores)

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

    async def _scores(self, request: pb.ScoreRequest, origin: Origin) -> list[pb.Score]:
        """Of all passages; the first that fails ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._score(passage, request.model, origin)) for passage in request.passages]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _score(self, passage: pb.Passage, model: str, origin: Origin) -> pb.Score:
        engine, info = self._calls.context.engine, self._calls.context.served()
        match passage.WhichOneof("form"):
            case "text":
                ids = await engine.tokenize(passage.text, True)
            case "token_ids":
                ids = list(passage.token_ids.ids)
                check_ids("passages", ids, info)
            case _:
                raise BadRequestError("passages: give text or token_ids in each", "passages")
        return pb.Score(token_ids=ids, logprobs=await engine.score(ids, model, origin))
