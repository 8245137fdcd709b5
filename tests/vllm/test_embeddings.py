"""A sparse model that makes embeddings: over HTTP as over gRPC, and what transformers makes of the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from sparse_serve.api.pb.v1 import chat_pb2, chat_pb2_grpc, tokens_pb2, tokens_pb2_grpc
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from tests import models
from tests.vllm.serving import PROMPT, Running, end, http_error, http_request, launch, make_checkpoint, wait_ready


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    flags = ["--runner=pooling", "--convert=embed", "--served-model-name=tiny", "--watchdog-s=6"]
    running = launch(make_checkpoint(folder), folder, *flags, "--max-sequences=4")
    try:
        yield wait_ready(running)
    finally:
        end(running)


def embed(server: Running, *texts: str) -> Any:
    request = tokens_pb2.EmbedRequest(passages=[tokens_pb2.Passage(text=text) for text in texts])
    return tokens_pb2_grpc.TokenServiceStub(server.channel).Embed(request)


def test_both_apis_give_the_embeddings_of_transformers(server: Running, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from maskgen.hf.loader import register

    register()
    texts = [PROMPT, "The river"]
    over_grpc = embed(server, *texts).embeddings
    over_http = json.loads(server.get("/v1/embeddings", {"model": "tiny", "input": texts}))["data"]
    model = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    for text, one, other in zip(texts, over_grpc, over_http, strict=True):
        ids = models.tokenizer().encode(text)
        with torch.no_grad():
            last = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1].float()
        assert list(one.values) == pytest.approx((last / last.norm()).tolist(), abs=1e-3)
        assert list(one.values) == pytest.approx(other["embedding"], abs=1e-4)
        assert one.prompt_tokens == len(ids)


def test_it_generates_nothing_and_says_so(server: Running) -> None:
    assert "/v1/embeddings" in server.output and " generate " not in server.output
    info = server.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert info.embeds and info.sparse_layers > 0
    message = chat_pb2.Message(role="user", content="a")
    for call in (
        lambda: server.stub.Generate(pb.GenerateRequest(text="a")),
        lambda: chat_pb2_grpc.ChatServiceStub(server.channel).Chat(chat_pb2.ChatRequest(messages=[message])),
    ):
        with pytest.raises(grpc.RpcError, match="generates no text"):
            call()
    assert http_error(server, "/v1/completions", http_request(1)).code in (400, 404)


def test_inputs_have_limits_like_prompts(server: Running) -> None:
    error = http_error(server, "/v1/embeddings", {"model": "tiny", "input": ["a"] * 5})
    assert error.code == 400
    for wrong in (["a"] * 5, ["a " * 5000]):
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            embed(server, *wrong)


def test_the_watchdog_lets_it_live(server: Running) -> None:
    with pytest.raises(Exception, match="timed out"):
        server.process.wait(8)
    assert len(embed(server, PROMPT).embeddings) == 1
