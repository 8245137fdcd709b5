"""The life of the process: start, ready, drain, death; with a fake engine."""

import asyncio
import dataclasses
import json
import logging
import shlex
import sys
from pathlib import Path

import grpc
import httpx
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.cli.serve import banner
from sparse_serve.engine.fake import INFO, FakeEngine
from sparse_serve.runtime.errors import EngineStartError, PortInUseError
from tests.sparse_serve.running import running


async def test_the_banner_comes_last_and_its_addresses_are_real() -> None:
    async with running() as server:
        (banner,) = server.banners
        assert str(server.http.base_url) in banner
        assert "3 sparse layers" in banner
        address = banner.split("--address ")[1].split()[0]
        async with grpc.aio.insecure_channel(address) as channel:
            await channel.channel_ready()
        assert server.metric("sparse_serve_ready") == 1


def printed(*start: str, model: str = "fake", grpc: str = "127.0.0.1:2") -> list[str]:
    """The words of the banner's line that starts with these, as a shell reads it."""
    lines = banner(dataclasses.replace(INFO, model=model), "127.0.0.1:1", grpc).splitlines()
    (words,) = [shlex.split(line) for line in lines if shlex.join(start) in line]
    return words


@pytest.mark.parametrize("model", ["plain", "it's", 'so "called" $HOME', "back\\slash"])
def test_the_printed_request_survives_quotes_in_the_models_name(model: str) -> None:
    words = printed("curl", "http://127.0.0.1:1/v1/completions", model=model)
    assert json.loads(words[-1])["model"] == model


def test_the_printed_command_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "an environment"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert printed("generate", "--address")[:3] == [str(folder / "python"), "-m", "sparse_serve.cli.main"]
    (folder / "sparse-serve").touch()
    words = printed("generate", "--address", grpc="[::1]:2")
    assert words[:4] == [str(folder / "sparse-serve"), "generate", "--address", "[::1]:2"]


async def test_the_engine_is_described_by_metrics() -> None:
    async with running() as server:
        assert server.metric("sparse_serve_sparse_layers", kernel="reference") == 2
        assert server.metric("sparse_serve_sparse_layers", kernel="cpu") == 1
        labels = {"out_features": "64", "in_features": "32", "values": "float", "tokens": "4", "kernel": "cpu"}
        assert server.metric("sparse_serve_kernel_speedup", **labels) == 1.5
        assert server.metric("sparse_serve_dense_layers") == 1
        assert server.metric("sparse_serve_weight_bytes", kind="resident") == 900
        assert server.metric("sparse_serve_weight_bytes", kind="dense_equivalent") == 1600


async def test_stop_lets_running_requests_finish_on_both_apis_then_ends_with_0() -> None:
    async with running(FakeEngine(delay_s=0.03)) as server:
        over_grpc = server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=12)))
        body = {"prompt": "ab", "max_tokens": 12}
        over_http = asyncio.create_task(server.http.post("/v1/completions", json=body))
        await server.until(lambda: server.engine.unfinished == 2)
        server.server.stop()
        server.server.stop()
        assert (await over_grpc).text == (await over_http).text == "ab" * 6
        assert await server.task == 0
    assert server.engine.stopped and server.engine.aborted == []


async def test_requests_that_do_not_finish_in_time_are_cut_off() -> None:
    async with running(FakeEngine(delay_s=0.05), drain_s=0.2) as server:
        call = server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=4000)))
        body = {"prompt": "ab", "max_tokens": 4000}
        over_http = asyncio.create_task(server.http.post("/v1/completions", json=body))
        await server.until(lambda: server.engine.unfinished == 2)
        server.server.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        with pytest.raises(httpx.HTTPError):
            await over_http
        async with asyncio.timeout(4):
            assert await server.task == 0
    assert len(server.engine.aborted) == 2
    assert server.metric("sparse_serve_cancelled_total", api="grpc") == 0, "the client did not cancel"


async def test_stop_during_the_start_ends_with_0_and_no_engine() -> None:
    """Even if the start never ends: a fake engine's goes on after its `stop`, as a download does."""
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        server.server.stop()
        async with asyncio.timeout(5):
            assert await server.task == 0
    assert server.engine.stopped and not server.banners


async def test_an_engine_that_does_not_start_closes_everything() -> None:
    engine = FakeEngine(start_error=EngineStartError("no memory"))
    with pytest.raises(EngineStartError, match="no memory"):
        async with running(engine):
            pass
    assert engine.stopped


async def test_a_dead_engine_ends_the_process_with_1() -> None:
    async with running(FakeEngine(delay_s=0.02)) as server:
        call = server.stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=4000)))
        await server.until(lambda: server.engine.unfinished == 1)
        server.engine.die()
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await call
        assert await server.task == 1
    assert server.engine.stopped


async def test_a_taken_grpc_port_stops_the_start_before_the_engine() -> None:
    async with running() as first:
        port = int(first.banners[0].split("--address 127.0.0.1:")[1].split()[0])
        engine = FakeEngine()
        with pytest.raises(PortInUseError, match=rf"127.0.0.1:{port}.*--grpc-port"):
            async with running(engine, grpc_port=port):
                pass
        assert not engine.started


async def test_one_part_that_fails_to_stop_does_not_keep_the_others_running(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(grace_s: float) -> None:
        raise RuntimeError("stuck")

    async with running() as server:
        monkeypatch.setattr(server.server.server_context.listener, "stop", broken)
        server.server.stop()
        assert await server.task == 0
        await type(server.server.server_context.listener).stop(server.server.server_context.listener, 0.0)
    assert server.engine.stopped
    assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)
