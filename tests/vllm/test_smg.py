"""`vllm.grpc.engine.VllmEngine` on the real engine, by the stubs of the project that made it."""

from __future__ import annotations

import io
import json
import urllib.request
import zipfile
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from sparse_serve.api.pb.v1 import admin_pb2, admin_pb2_grpc
from tests import models
from tests.vllm.serving import PROMPT, Running, end, grpc_request, launch, make_checkpoint, wait_ready

pytest.importorskip("smg_grpc_servicer", reason="the extra smg is not installed")
from smg_grpc_proto import vllm_engine_pb2 as smg
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

KEYS = {name: f"{name}-key-0123456789" for name in ("one", "two", "operator")}


def as_(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {KEYS[name]}"),)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("smg")
    (folder / "keys").write_text(f"{KEYS['one']}\n{KEYS['two']}\n")
    (folder / "admin").write_text(KEYS["operator"])
    flags = ["--smg", f"--api-keys={folder / 'keys'}", f"--admin-keys={folder / 'admin'}", "--served-model-name=tiny"]
    running = launch(make_checkpoint(folder), folder, *flags, "--max-sequences-per-client=8", "--max-sequences=4")
    try:
        yield wait_ready(running)
    finally:
        end(running)


@pytest.fixture
def stub(server: Running) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(server.channel)


def asked(max_tokens: int, **more: Any) -> Any:
    ids = models.tokenizer().encode(PROMPT)
    params = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "skip_special_tokens": True}
    params |= more.pop("params", {})
    tokenized = smg.TokenizedInput(input_ids=ids)
    return smg.GenerateRequest(tokenized=tokenized, sampling_params=smg.SamplingParams(**params), **more)


def test_tokens_are_those_of_our_own_protocol(server: Running, stub: Any) -> None:
    ours = list(server.stub.Generate(grpc_request(24), metadata=as_("one")).token_ids)
    (whole,) = stub.Generate(asked(24), metadata=as_("one"))
    assert list(whole.complete.output_ids) == ours and whole.complete.finish_reason == "length"
    pieces = list(stub.Generate(asked(24, stream=True, request_id="mine-1"), metadata=as_("one")))
    assert [id_ for piece in pieces[:-1] for id_ in piece.chunk.token_ids] == ours
    assert pieces[-1].WhichOneof("response") == "complete"
    text = smg.GenerateRequest(text=PROMPT, sampling_params=asked(24).sampling_params)
    (whole,) = stub.Generate(text, metadata=as_("one"))
    assert list(whole.complete.output_ids) == ours


def test_nobody_comes_in_without_a_key(stub: Any) -> None:
    for metadata in ((), as_("operator")):
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            list(stub.Generate(asked(1), metadata=metadata))


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (asked(1, params={"n": 5}), "5 sequences"),
        (asked(1, params={"regex": "a" * 5000}), "regex takes 5000 bytes"),
        (asked(1, params={"stop": ["a"] * 17}), "stop has 17"),
        (asked(1, request_id="a b"), "request_id has to be"),
        (asked(1, media_refs=smg.MediaRefs()), "text and tokens only"),
        (asked(1, kv_transfer_params_json="{}"), "text and tokens only"),
        (asked(1, params={"logprobs": -1}), "logprobs"),
        (smg.GenerateRequest(tokenized=smg.TokenizedInput(input_ids=[1 << 20])), "out of vocabulary"),
        (smg.GenerateRequest(tokenized=smg.TokenizedInput(input_ids=[5] * 5000)), "maximum"),
    ],
)
def test_the_limits_are_those_of_our_own_protocol(stub: Any, request_: Any, why: str) -> None:
    with pytest.raises(grpc.RpcError, match=why) as caught:
        list(stub.Generate(request_, metadata=as_("one")))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata())


def test_a_client_ends_its_own_requests_only(server: Running, stub: Any) -> None:
    call = stub.Generate(asked(900, stream=True, request_id="mine-2"), metadata=as_("one"))
    next(call)
    stub.Abort(smg.AbortRequest(request_ids=["mine-2"]), metadata=as_("two"))
    for _ in range(20):
        next(call)
    stub.Abort(smg.AbortRequest(request_ids=["mine-2", "nobodys"]), metadata=as_("one"))
    with pytest.raises(grpc.RpcError, match="ABORTED"):
        list(call)


def test_an_operator_ends_any(server: Running, stub: Any) -> None:
    call = stub.Generate(asked(900, stream=True, request_id="mine-3"), metadata=as_("one"))
    next(call)
    admin = admin_pb2_grpc.AdminServiceStub(server.channel)
    assert admin.Abort(admin_pb2.AbortRequest(request_id="mine-3"), metadata=as_("operator")).requests == 1
    with pytest.raises(grpc.RpcError, match="ABORTED"):
        list(call)


def test_what_is_told_of_the_server_names_no_directory(server: Running, stub: Any) -> None:
    assert stub.HealthCheck(smg.HealthCheckRequest(), metadata=as_("one")).healthy
    model = stub.GetModelInfo(smg.GetModelInfoRequest(), metadata=as_("one"))
    assert (model.served_model_name, model.model_path, model.tokenizer_path) == ("tiny",) * 3
    assert model.is_generation and model.max_context_length == 1024
    info = stub.GetServerInfo(smg.GetServerInfoRequest(), metadata=as_("one"))
    assert str(server.directory) not in str(info) + str(model)
    (load,) = stub.GetLoads(smg.GetLoadsRequest(), metadata=as_("one")).loads
    assert load.num_running_reqs == 0
    chunks = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest(), metadata=as_("one")))
    archive = zipfile.ZipFile(io.BytesIO(b"".join(chunk.data for chunk in chunks)))
    assert json.loads(archive.read("tokenizer.json"))


@pytest.mark.parametrize("method", ["Embed", "FlushCache", "StartProfile", "StopProfile", "SubscribeKvEvents"])
def test_what_this_server_does_not_do_says_so(stub: Any, method: str) -> None:
    requests = {
        "Embed": smg.EmbedRequest(tokenized=smg.TokenizedInput(input_ids=[1])),
        "FlushCache": common_pb2.FlushCacheRequest(),
        "StartProfile": common_pb2.StartProfileRequest(),
        "StopProfile": common_pb2.StopProfileRequest(),
        "SubscribeKvEvents": common_pb2.SubscribeKvEventsRequest(),
    }
    with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
        answer = getattr(stub, method)(requests[method], metadata=as_("one"))
        if method == "SubscribeKvEvents":
            next(answer)


def test_its_calls_are_counted(server: Running) -> None:
    request = urllib.request.Request(server.http + "/metrics", headers=dict(as_("one")))
    with urllib.request.urlopen(request, timeout=30) as response:
        text = response.read().decode()
    counted = [line for line in text.splitlines() if line.startswith("sparse_serve_requests_total")]
    assert any('method="VllmEngine.Generate"' in line and 'code="OK"' in line for line in counted)
