"""The life of the process: start, ready, drain, death; with a fake engine."""

import asyncio
import logging

import grpc
import httpx
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine.fake import INFO, FakeEngine
from sparse_serve.runtime.errors import EngineStartError, PortInUseError
from sparse_serve.server.lifecycle import CutOff, Draining, EngineDied, Listening, Ready, Stopped
from tests.sparse_serve.running import running


async def test_ready_comes_last_and_its_addresses_are_real() -> None:
    async with running() as server:
        listening, ready = server.events
        assert ready == Ready(INFO, listening.http, listening.grpc)
        assert str(server.http.base_url) == f"http://{listening.http}"
        async with grpc.aio.insecure_channel(ready.grpc) as channel:
            await channel.channel_ready()
        assert server.metric("sparse_serve_ready") == 1


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
    assert server.events[2:] == [Draining(2, 5.0), Stopped()]


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
        async with asyncio.timeout(20):  # the default is to wait for 30
            assert await server.task == 0
    assert len(server.engine.aborted) == 2
    assert server.events[2:] == [Draining(2, 0.2), CutOff(2, 0.2), Stopped()]
    assert server.metric("sparse_serve_cancelled_total", api="grpc") == 0, "the client did not cancel"


async def test_stop_during_the_start_ends_with_0_and_no_engine() -> None:
    """Even if the start never ends: a fake engine's goes on after its `stop`, as a download does."""
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        server.server.stop()
        async with asyncio.timeout(30):
            assert await server.task == 0
    assert server.engine.stopped
    assert [type(event) for event in server.events] == [Listening, Stopped]


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
    assert server.events[2:] == [EngineDied(), Stopped()]


async def test_a_taken_grpc_port_stops_the_start_before_the_engine() -> None:
    async with running() as first:
        port = int(first.grpc_address.rpartition(":")[2])
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
        monkeypatch.setattr(server.server.context.listener, "stop", broken)
        server.server.stop()
        assert await server.task == 0
        await type(server.server.context.listener).stop(server.server.context.listener, 0.0)
    assert server.engine.stopped
    assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)
