"""The gRPC API over real sockets, with a fake engine behind it."""

import asyncio
import sys

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sparse_serve.api.grpc_v1 import SERVICE
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine import EngineInfo
from sparse_serve.engine.fake import INFO, FakeEngine
from sparse_serve.runtime.errors import EngineDiedError, OverloadedError, SettingsError
from tests.sparse_serve.running import Running, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def text_request(text: str = "abc", **sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.Sampling(**sampling))


def stream_request(text: str = "abc", **sampling) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(text=text, sampling=pb.Sampling(**sampling))


async def health_of(running: Running, service: str = SERVICE) -> int:
    stub = health_pb2_grpc.HealthStub(running.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_generate_answers_text_tokens_reason_and_usage() -> None:
    async with running() as server:
        response = await server.stub.Generate(text_request(max_tokens=5))
    assert response.text == "abcab"
    assert list(response.token_ids) == [97, 98, 99, 97, 98]
    assert response.finish_reason == pb.FINISH_REASON_LENGTH
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (3, 5)
    assert not response.logprobs and not response.prompt_logprobs


async def test_token_ids_in_give_what_text_in_gives() -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[97, 98, 99]), sampling=pb.Sampling(max_tokens=4))
    async with running() as server:
        response = await server.stub.Generate(request)
    assert response.text == "abca"
    assert server.engine.requests[0].prompt == (97, 98, 99)


async def test_a_stream_is_the_same_answer_in_pieces_and_only_its_end_has_a_reason() -> None:
    async with running() as server:
        whole = await server.stub.Generate(text_request(max_tokens=6, logprobs=1, prompt_logprobs=0))
        pieces = [
            p async for p in server.stub.GenerateStream(stream_request(max_tokens=6, logprobs=1, prompt_logprobs=0))
        ]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [id_ for piece in pieces for id_ in piece.token_ids] == list(whole.token_ids)
    assert [entry for piece in pieces for entry in piece.logprobs] == list(whole.logprobs)
    assert list(pieces[0].prompt_logprobs) == list(whole.prompt_logprobs)
    assert [bool(piece.finish_reason) for piece in pieces] == [False] * 5 + [True]
    assert [piece.usage.completion_tokens for piece in pieces] == [1, 2, 3, 4, 5, 6]


async def test_log_probabilities_name_the_token_and_the_best_ones() -> None:
    async with running() as server:
        response = await server.stub.Generate(text_request(max_tokens=2, logprobs=2, prompt_logprobs=0))
    assert [entry.token.token_id for entry in response.logprobs] == [97, 98]
    assert response.logprobs[0].token.logprob == pytest.approx(-0.097)
    assert [len(entry.top) for entry in response.logprobs] == [2, 2]
    assert [entry.token.token_id for entry in response.prompt_logprobs] == [98, 99]
    assert [len(entry.top) for entry in response.prompt_logprobs] == [0, 0]


async def test_what_is_not_given_is_not_zero() -> None:
    async with running() as server:
        await server.stub.Generate(text_request())
        await server.stub.Generate(text_request(temperature=0, top_k=0, min_p=0, logprobs=0, seed=0))
    absent, zero = (request.sampling for request in server.engine.requests)
    assert (absent.temperature, absent.top_k, absent.min_p, absent.logprobs, absent.seed) == (None,) * 5
    assert (zero.temperature, zero.top_k, zero.min_p, zero.logprobs, zero.seed) == (0,) * 5


async def test_model_info() -> None:
    async with running() as server:
        info = await server.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.max_model_len, info.vocab_size) == (INFO.model, INFO.max_model_len, INFO.vocab_size)
    assert (info.sparse_layers, info.dense_layers, dict(info.kernels)) == (3, 1, {"reference": 2, "cpu": 1})
    assert (info.sparse_weight_bytes, info.dense_equivalent_bytes) == (900, 1600)
    assert list(info.models) == ["fake"]
    quality = info.quality
    assert (quality.dense_perplexity, quality.perplexity, quality.kl_divergence) == (20.0, 50.0, 0.75)
    assert (quality.top1_agreement, quality.windows, quality.window_tokens) == (0.5, 16, 512)
    assert list(quality.texts) == ["a.txt"] and quality.bad
    assert INFO.quality is not None and list(quality.advice) == INFO.quality.advice() != []


async def failure(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_bad_request_is_invalid_argument_naming_the_field() -> None:
    async with running() as server:
        error = await failure(server.stub.Generate(text_request(temperature=-1)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature is -1.0" in error.details()
    assert server.engine.requests == []


async def test_another_model_is_not_found_until_it_is_served() -> None:
    async with running() as server:
        request = pb.GenerateRequest(text="a", model="adapter")
        error = await failure(server.stub.Generate(request))
        assert (error.code(), "'fake'" in error.details()) == (grpc.StatusCode.NOT_FOUND, True)
        server.engine.models = ("fake", "adapter")
        assert list((await server.stub.GetModelInfo(pb.GetModelInfoRequest())).models) == ["fake", "adapter"]
        assert (await server.stub.Generate(request)).text
    assert server.engine.requests[0].model == "adapter"


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (OverloadedError("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (EngineDiedError("gone"), grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_an_error_that_may_pass_says_when_to_try_again(raised: Exception, code: grpc.StatusCode) -> None:
    async with running() as server:
        server.engine.fail_with = raised
        error = await failure(server.stub.Generate(text_request()))
    assert (error.code(), error.details()) == (code, str(raised))
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert status.code == code.value[0] and status.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() > 0


async def test_an_unexpected_error_shows_the_client_an_id_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server:
        server.engine.fail_with = RuntimeError("secret at 0x7f00")
        error = await failure(server.stub.Generate(text_request()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    error_id = error.details().split()[2].rstrip(":")
    record = next(record for record in caplog.records if error_id in record.getMessage())
    assert "secret" in str(record.exc_info[1])


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_cancelled_call_is_aborted_in_the_engine_and_counted(method: str) -> None:
    async with running(FakeEngine(delay_s=0.02)) as server:
        make = stream_request if method == "GenerateStream" else text_request
        call = getattr(server.stub, method)(make(max_tokens=1000))
        await server.until(lambda: server.engine.unfinished == 1)
        call.cancel()
        await server.until(lambda: server.engine.unfinished == 0)
        await server.until(lambda: server.metric("sparse_serve_cancelled_total", api="grpc") == 1)
    assert len(server.engine.aborted) == 1
    assert server.metric("sparse_serve_requests_total", api="grpc", method=method, code="CANCELLED") == 1


async def test_a_deadline_that_passes_aborts_too() -> None:
    async with running(FakeEngine(delay_s=0.02)) as server:
        error = await failure(server.stub.Generate(text_request(max_tokens=1000), timeout=0.1))
        await server.until(lambda: server.engine.unfinished == 0)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(server.engine.aborted) == 1


async def test_a_message_over_the_limit_is_refused() -> None:
    async with running(max_message_bytes=2048) as server:
        error = await failure(server.stub.Generate(text_request("x" * 4096)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.engine.requests == []


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_follows_the_phase(service: str) -> None:
    engine, may_start = FakeEngine(), asyncio.Event()

    async def start() -> EngineInfo:
        await may_start.wait()
        return INFO

    engine.start = start
    async with running(engine, ready=False) as server:
        assert await health_of(server, service) == NOT_SERVING
        error = await failure(server.stub.Generate(text_request()))
        assert (error.code(), "starting" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)
        may_start.set()
        await server.until(lambda: server.is_ready)
        assert await health_of(server, service) == SERVING
        server.engine.delay_s = 0.05
        call = server.stub.Generate(text_request(max_tokens=10))
        await server.until(lambda: server.engine.unfinished == 1)
        server.server.stop()
        await server.until(lambda: server.metric("sparse_serve_ready") == 0)
        await asyncio.sleep(0)
        assert await health_of(server, service) == NOT_SERVING
        error = await failure(server.stub.Generate(text_request()))
        assert (error.code(), "draining" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)
        assert len((await call).token_ids) == 10


async def test_reflection_lists_the_services_and_can_be_off() -> None:
    async def listed(server: Running) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        return {service.name async for reply in call for service in reply.list_services_response.service}

    async with running() as server:
        assert {SERVICE, "grpc.health.v1.Health"} <= await listed(server)
    async with running(reflection=False) as server:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await listed(server)


async def test_the_protocol_of_routers_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smg_grpc_proto", None)
    with pytest.raises(SettingsError, match=r"--smg: not installed; pip install 'sparse-serve\[smg\]'"):
        async with running(smg=True):
            pass
