"""Chats, tokens, several sequences and the details of errors over gRPC, with a fake engine."""

from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from sparse_serve.api.pb.v1 import chat_pb2, chat_pb2_grpc, tokens_pb2, tokens_pb2_grpc
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine import Origin
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.runtime.errors import TooManyError, UnavailableError
from tests.sparse_serve.running import Running, running


def chat(server: Running) -> Any:
    return chat_pb2_grpc.ChatServiceStub(server.channel)


def tokens(server: Running) -> Any:
    return tokens_pb2_grpc.TokenServiceStub(server.channel)


def asked(text: str, kind: Any = chat_pb2.ChatRequest, **more: Any) -> Any:
    return kind(messages=[chat_pb2.Message(role="user", content=text)], **more)


TOOL = chat_pb2.Tool(name="find", description="finds", parameters='{"type": "object"}')


async def test_a_chat_is_the_same_at_once_and_in_pieces() -> None:
    async with running() as server:
        whole = await chat(server).Chat(asked("hello", tools=[TOOL]))
        pieces = [
            piece async for piece in chat(server).ChatStream(asked("hello", chat_pb2.ChatStreamRequest, tools=[TOOL]))
        ]
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "tool_calls"
    assert choice.message.content == "".join(piece.content for piece in pieces) == "hello"
    (call,) = choice.message.tool_calls
    assert (call.id, call.name, call.arguments) == ("call-0", "find", '{"x": "hello"}')
    assert [*pieces[-2].tool_calls] == [call] and pieces[-2].finish_reason == "tool_calls"
    assert pieces[-1].usage == whole.usage and whole.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (chat_pb2.ChatRequest(), "messages"),
        (chat_pb2.ChatRequest(messages=[chat_pb2.Message(content="a")]), "messages.role"),
        (asked("a", sampling=pb.Sampling(logprobs=1)), "sampling.logprobs"),
        (asked("a", sampling=pb.Sampling(n=1000)), "n"),
        (asked("a", tools=[chat_pb2.Tool(name="f", parameters="{")]), "tools.parameters"),
        (asked("a", tools=[chat_pb2.Tool(name="f", parameters="[1]")]), "tools.parameters"),
        (asked("a", tools=[TOOL], tool_choice="other"), "tool_choice"),
        (asked("a", tools=[chat_pb2.Tool(name="f", description="a" * 300_000)]), "tools"),
    ],
)
async def test_what_is_wrong_with_a_chat_is_named(request_: Any, field: str) -> None:
    async with running() as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await chat(server).Chat(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value) == [field]


def details(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def violations(error: grpc.aio.AioRpcError) -> list[str]:
    return [found.field for found in details(error, error_details_pb2.BadRequest).field_violations]


@pytest.mark.parametrize(
    ("raised", "reason", "retries"),
    [
        (UnavailableError("later"), "UNAVAILABLE", True),
        (TooManyError("enough"), "TOO_MANY", True),
        (RuntimeError("at 0x7f"), "INTERNAL", False),
    ],
)
async def test_every_status_has_a_reason_that_programs_can_read(raised: Exception, reason: str, retries: bool) -> None:
    async with running() as server:
        server.engine.fail_with = raised
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Generate(pb.GenerateRequest(text="a"))
    info = details(caught.value, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason, "sparse-serve")
    assert (details(caught.value, error_details_pb2.RetryInfo) is not None) == retries


async def test_several_sequences_come_apart_and_together() -> None:
    async with running() as server:
        sampling = pb.Sampling(max_tokens=4, n=3, logprobs=0, prompt_logprobs=0)
        whole = await server.stub.Generate(pb.GenerateRequest(text="ab", sampling=sampling))
        stream = server.stub.GenerateStream(pb.GenerateStreamRequest(text="ab", sampling=sampling))
        pieces = [piece async for piece in stream]
        one = await server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=4)))
    assert [sequence.text for sequence in whole.sequences] == ["abab"] * 3 and whole.text == "abab"
    assert [len(sequence.logprobs) for sequence in whole.sequences] == [4] * 3 and len(whole.prompt_logprobs) == 1
    for index in range(3):
        assert "".join(piece.text for piece in pieces if piece.index == index) == "abab"
    assert sum(piece.finish_reason != pb.FINISH_REASON_UNSPECIFIED for piece in pieces) == 3
    assert not one.sequences


async def test_sequences_of_a_call_count_for_its_client() -> None:
    async with running(FakeEngine(delay_s=0.05), max_sequences_per_client=3) as server:
        running_call = server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(n=2, max_tokens=50)))
        await server.until(lambda: server.engine.unfinished == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
            await server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(n=2)))
        passages = [tokens_pb2.Passage(text="abc")] * 4
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await tokens(server).Score(tokens_pb2.ScoreRequest(passages=passages))
        running_call.cancel()


@pytest.mark.parametrize(
    "method",
    ["GenerationService/Generate", "GenerationService/GenerateStream", "ChatService/Chat", "TokenService/Score"],
)
async def test_bytes_that_are_no_message_are_the_clients_fault(method: str) -> None:
    async with running() as server:
        path = f"/sparse_serve.v1.{method}"
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            if method.endswith("Stream"):
                async for _ in server.channel.unary_stream(path)(b"\xff\xff\xff"):
                    pass
            else:
                await server.channel.unary_unary(path)(b"\xff\xff\xff")


async def test_models_are_listed_with_what_they_are() -> None:
    engine = FakeEngine()
    engine.models, engine.adapters = ("fake", "second", "tuned"), ("tuned",)
    async with running(engine) as server:
        listed = await server.stub.ListModels(pb.ListModelsRequest())
    assert [(model.name, model.is_adapter) for model in listed.models] == [
        ("fake", False), ("second", False), ("tuned", True),
    ]  # fmt: skip


async def test_an_id_goes_through_the_call_and_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sparse_serve.access")
    async with running() as server:
        call = server.stub.Generate(pb.GenerateRequest(text="a"), metadata=(("x-request-id", "mine-1"),))
        await call
        assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"
        assert server.engine.requests[0].origin.id == "mine-1"
        made = server.stub.Generate(pb.GenerateRequest(text=""))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await made
        assert len(dict(caught.value.trailing_metadata())["x-request-id"]) == 32
        with pytest.raises(grpc.aio.AioRpcError, match="x-request-id has to be"):
            await server.stub.Generate(pb.GenerateRequest(text="a"), metadata=(("x-request-id", "a b"),))
        await server.http.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "two"}
        )
        await server.until(lambda: any(getattr(record, "id", "") == "two" for record in caplog.records))
    found = {record.id: (record.api, record.code) for record in caplog.records if record.name == "sparse_serve.access"}
    assert found["mine-1"] == ("grpc", "OK") and found["two"] == ("http", "200")


TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}


async def test_the_engine_hears_of_the_id_and_the_trace_of_every_call() -> None:
    metadata = (*TRACE.items(), ("x-request-id", "mine"))
    expected = Origin("mine", TRACE)
    async with running() as server:
        stub = server.stub
        await stub.Generate(pb.GenerateRequest(text="a"), metadata=metadata)
        [_ async for _ in stub.GenerateStream(pb.GenerateStreamRequest(text="a"), metadata=metadata)]
        await chat(server).Chat(asked("a"), metadata=metadata)
        [_ async for _ in chat(server).ChatStream(asked("a", chat_pb2.ChatStreamRequest), metadata=metadata)]
        passages = [tokens_pb2.Passage(text="ab")]
        await tokens(server).Score(tokens_pb2.ScoreRequest(passages=passages), metadata=metadata)
        assert [request.origin for request in server.engine.requests] == [expected] * 2
        assert server.engine.origins == [expected] * 3


@pytest.mark.parametrize(
    ("given", "heard"),
    [
        ({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"}, {}),
        ({"traceparent": "x" * 55}, {}),
        ({"tracestate": "a=1"}, {}),
        (TRACE | {"tracestate": "a=" + "1" * 600}, {"traceparent": TRACE["traceparent"]}),
    ],
)
async def test_what_is_no_trace_is_not_passed_on(given: dict[str, str], heard: dict[str, str]) -> None:
    async with running() as server:
        await server.stub.Generate(pb.GenerateRequest(text="a"), metadata=tuple(given.items()))
    assert server.engine.requests[0].origin.trace == heard


async def test_a_piece_of_a_tools_call_may_lack_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    async def said(self: FakeEngine, body: Any, origin: Origin) -> AsyncGenerator[Any, None]:
        for calls in ([{"index": 0, "id": "c", "type": "function"}], [{"index": 0, "function": {"arguments": "{}"}}]):
            yield {"choices": [{"index": 0, "delta": {"tool_calls": calls}, "finish_reason": None}]}

    monkeypatch.setattr(FakeEngine, "chat", said)
    async with running() as server:
        call = chat(server).ChatStream(asked("a", chat_pb2.ChatStreamRequest, tools=[TOOL]))
        made = [(one.id, one.name, one.arguments) async for piece in call for one in piece.tool_calls]
    assert made == [("c", "", ""), ("", "", "{}")]
