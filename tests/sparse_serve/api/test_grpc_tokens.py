"""Scores, embeddings and tokens over gRPC, with a fake engine."""

import asyncio

import grpc
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.api.pb.v1 import tokens_pb2
from sparse_serve.engine import Origin
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.runtime.errors import BadRequestError
from tests.sparse_serve.api.test_grpc_services import asked, chat, tokens, violations
from tests.sparse_serve.running import running


async def test_a_passage_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    running_now: set[int] = set()

    async def score(self: FakeEngine, token_ids: list[int], model: str, origin: Origin) -> list[float]:
        if len(token_ids) == 1:
            raise BadRequestError("one token")
        running_now.add(len(token_ids))
        try:
            await asyncio.sleep(60)
        finally:
            running_now.discard(len(token_ids))
        return []

    monkeypatch.setattr(FakeEngine, "score", score)
    async with running() as server:
        passages = [tokens_pb2.Passage(text="ab"), tokens_pb2.Passage(text="abc"), tokens_pb2.Passage(text="")]
        with pytest.raises(grpc.aio.AioRpcError, match="one token"):
            await tokens(server).Score(tokens_pb2.ScoreRequest(passages=passages))
        assert not running_now


async def test_passages_are_scored_side_by_side() -> None:
    passages = [tokens_pb2.Passage(text="ab"), tokens_pb2.Passage(token_ids=pb.TokenIds(ids=[5, 1000, 2000]))]
    async with running() as server:
        answer = await tokens(server).Score(tokens_pb2.ScoreRequest(passages=passages))
        for wrong, field in (
            ([], "passages"),
            ([tokens_pb2.Passage()], "passages"),
            ([tokens_pb2.Passage(token_ids=pb.TokenIds(ids=[1, 0x110000]))], "passages"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await tokens(server).Score(tokens_pb2.ScoreRequest(passages=wrong))
            assert violations(caught.value) == [field]
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await tokens(server).Score(tokens_pb2.ScoreRequest(passages=passages, model="other"))
    text, ids = answer.scores
    assert list(text.token_ids) == [1, 97, 98] and len(text.logprobs) == 2
    assert list(ids.logprobs) == pytest.approx([-1.0, -2.0])


async def test_a_model_makes_embeddings_or_text() -> None:
    passages = [tokens_pb2.Passage(text="ab"), tokens_pb2.Passage(token_ids=pb.TokenIds(ids=[5, 6]))]
    engine = FakeEngine()
    engine.embeds = True
    async with running(engine) as server:
        answer = await tokens(server).Embed(tokens_pb2.EmbedRequest(passages=passages))
        assert [(list(one.values), one.prompt_tokens) for one in answer.embeddings] == [
            ([3.0, pytest.approx(0.001)], 3), ([2.0, pytest.approx(0.005)], 2),
        ]  # fmt: skip
        assert (await server.stub.GetModelInfo(pb.GetModelInfoRequest())).embeds
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await tokens(server).Embed(tokens_pb2.EmbedRequest(passages=passages, model="other"))
        for call in (
            server.stub.Generate(pb.GenerateRequest(text="a")),
            chat(server).Chat(asked("a")),
            tokens(server).Score(tokens_pb2.ScoreRequest(passages=passages)),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=r"UNIMPLEMENTED(.|\n)*generates no text"):
                await call
    async with running() as server:
        with pytest.raises(grpc.aio.AioRpcError, match=r"UNIMPLEMENTED(.|\n)*makes no embeddings"):
            await tokens(server).Embed(tokens_pb2.EmbedRequest(passages=passages))


async def test_text_to_tokens_and_back() -> None:
    async with running() as server:
        stub = tokens(server)
        with_special = await stub.Tokenize(tokens_pb2.TokenizeRequest(text="ab"))
        plain = await stub.Tokenize(tokens_pb2.TokenizeRequest(text="ab", without_special_tokens=True))
        assert (list(with_special.token_ids), list(plain.token_ids)) == ([1, 97, 98], [97, 98])
        back = await stub.Detokenize(tokens_pb2.DetokenizeRequest(token_ids=[97, 98]))
        assert back.text == "ab"
