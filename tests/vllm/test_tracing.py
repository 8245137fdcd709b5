"""Spans of the engine under the trace of its client, over both APIs, as a collector gets them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from sparse_serve.api.pb.v1 import chat_pb2, chat_pb2_grpc, tokens_pb2, tokens_pb2_grpc
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from tests.vllm.serving import (
    PROMPT,
    Running,
    end,
    grpc_request,
    http_request,
    launch,
    make_checkpoint,
    until,
    wait_ready,
)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    collector, served = Collector(), grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, served)
    port = served.add_insecure_port("127.0.0.1:0")
    served.start()
    yield collector, f"http://127.0.0.1:{port}"
    served.stop(None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: tuple[Collector, str]) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tracing")
    template = folder / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    flags = [f"--otlp-traces-endpoint={collector[1]}", f"--chat-template={template}", "--served-model-name=tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        running = launch(make_checkpoint(folder), folder, *flags)
    try:
        yield wait_ready(running)
    finally:
        end(running)


def _trace(number: int) -> str:
    return f"{number:032x}"


def test_a_span_of_every_request_is_in_its_clients_trace(server: Running, collector: tuple[Collector, str]) -> None:
    def told(number: int) -> list[tuple[str, str]]:
        return [("traceparent", f"00-{_trace(number)}-00000000000000aa-01"), ("x-request-id", f"mine-{number}")]

    server.stub.Generate(grpc_request(2), metadata=told(1))
    list(server.stub.GenerateStream(grpc_request(2, pb.GenerateStreamRequest), metadata=told(2)))
    message = chat_pb2.Message(role="user", content=PROMPT)
    chats = chat_pb2_grpc.ChatServiceStub(server.channel)
    chats.Chat(chat_pb2.ChatRequest(messages=[message], sampling=pb.Sampling(max_tokens=2)), metadata=told(3))
    passages = [tokens_pb2.Passage(text=PROMPT)]
    tokens_pb2_grpc.TokenServiceStub(server.channel).Score(tokens_pb2.ScoreRequest(passages=passages), metadata=told(4))
    _post(server, "/v1/completions", http_request(2), told(5))
    _post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}, told(6))

    def found() -> dict[str, Any]:
        spans = [span for span in collector[0].spans if span.name == "llm_request"]
        return {span.trace_id.hex(): span for span in spans if int(span.trace_id.hex(), 16) < 9}

    until(lambda: len(found()) == 6)
    for number in range(1, 7):
        span = found()[_trace(number)]
        assert span.parent_span_id.hex() == "00000000000000aa"
        (id_,) = [one.value.string_value for one in span.attributes if one.key == "gen_ai.request.id"]
        assert f"mine-{number}" in id_


def _post(server: Running, path: str, body: Any, headers: list[tuple[str, str]]) -> None:
    content = {"content-type": "application/json", **dict(headers)}
    request = urllib.request.Request(server.http + path, json.dumps(body).encode(), content)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
