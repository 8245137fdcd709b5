"""The service for operators: who may call it, and what it does to the requests of others; with a fake engine."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest

from sparse_serve.api.pb.v1 import admin_pb2, admin_pb2_grpc
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.runtime.errors import SettingsError
from tests.sparse_serve.running import Running, running

KEY, CLIENTS = "operators-key-0123456789", "clients-key-0123456789"
METADATA = (("authorization", f"Bearer {KEY}"),)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    (tmp_path / "admin").write_text(KEY)
    return str(tmp_path / "admin")


def admin(server: Running) -> Any:
    return admin_pb2_grpc.AdminServiceStub(server.channel)


async def test_without_the_flag_there_is_no_such_service() -> None:
    async with running() as server:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await admin(server).Drain(admin_pb2.DrainRequest(), metadata=METADATA)
        assert not server.task.done()


@pytest.mark.parametrize("closed", [False, True])
async def test_it_has_keys_of_its_own(keys: str, closed: bool, tmp_path: Path) -> None:
    (tmp_path / "clients").write_text(CLIENTS)
    settings = {"api_keys": str(tmp_path / "clients")} if closed else {}
    async with running(admin_keys=keys, **settings) as server:
        for metadata in ((), (("authorization", f"Bearer {CLIENTS}"),)):
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await admin(server).Drain(admin_pb2.DrainRequest(), metadata=metadata)
        answer = await admin(server).Abort(admin_pb2.AbortRequest(request_id="nobodys"), metadata=METADATA)
        assert answer.requests == 0
        if closed:
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await server.stub.Generate(pb.GenerateRequest(text="a"), metadata=METADATA)


async def test_an_aborted_request_is_told_and_gone_from_the_engine(keys: str) -> None:
    long = {"prompt": "ab", "max_tokens": 4000}
    named = {"x-request-id": "theirs"}
    async with running(FakeEngine(delay_s=0.02), admin_keys=keys) as server:
        late = asyncio.create_task(server.http.post("/v1/completions?late", json=long, headers=named))
        stream = asyncio.create_task(server.http.post("/v1/completions?sse", json=long, headers=named))
        other = asyncio.create_task(server.http.post("/v1/completions?sse", json=long | {"max_tokens": 40}))
        sampling = pb.Sampling(max_tokens=4000)
        call = server.stub.GenerateStream(
            pb.GenerateStreamRequest(text="a", sampling=sampling), metadata=tuple(named.items())
        )
        await call.read()
        await server.until(lambda: server.engine.unfinished == 4)
        await asyncio.sleep(0.1)
        answer = await admin(server).Abort(
            admin_pb2.AbortRequest(request_id="theirs"), metadata=(*METADATA, *named.items())
        )
        assert answer.requests == 3
        assert ((await late).status_code, (await late).headers["x-should-retry"]) == (409, "false")
        assert (await stream).text.endswith("data: [DONE]\n\n") and '"code": 409' in (await stream).text
        with pytest.raises(grpc.aio.AioRpcError, match="ABORTED"):
            while await call.read() is not grpc.aio.EOF:
                pass
        assert len((await other).text) == 40
        assert server.engine.unfinished == 0 and len(server.engine.aborted) == 3
    for api in ("http", "grpc"):
        assert server.metric("sparse_serve_truncated_streams_total", api=api, cause="aborted") == 1
        assert server.metric("sparse_serve_cancelled_total", api=api) == 0


async def test_a_drain_may_be_asked_for(keys: str) -> None:
    async with running(FakeEngine(delay_s=0.02), admin_keys=keys, drain_s=7.0) as server:
        body = {"prompt": "ab", "max_tokens": 30}
        task = asyncio.create_task(server.http.post("/v1/completions", json=body))
        await server.until(lambda: server.engine.unfinished == 1)
        answer = await admin(server).Drain(admin_pb2.DrainRequest(), metadata=METADATA)
        assert (answer.requests, answer.limit_s) == (1, 7.0)
        assert len((await task).text) == 30
        assert await server.task == 0


async def test_the_level_of_the_log_can_be_changed(keys: str) -> None:
    name = "sparse_serve.access"
    before = logging.getLogger(name).level
    try:
        async with running(admin_keys=keys) as server:
            for level, was in (
                (admin_pb2.LOG_LEVEL_ERROR, None),
                (admin_pb2.LOG_LEVEL_INFO, admin_pb2.LOG_LEVEL_ERROR),
            ):
                request = admin_pb2.SetLogLevelRequest(level=level, logger=name)
                answer = await admin(server).SetLogLevel(request, metadata=METADATA)
                assert was is None or answer.before == was
            assert logging.getLogger(name).level == logging.INFO
            for wrong in ({"logger": "root"}, {"logger": "sparse_serve.nobody"}, {"level": 0}, {"level": 9}):
                request = admin_pb2.SetLogLevelRequest(**{"level": 1} | wrong)
                with pytest.raises(grpc.aio.AioRpcError, match=f"INVALID_ARGUMENT(.|\n)*{next(iter(wrong))} is"):
                    await admin(server).SetLogLevel(request, metadata=METADATA)
    finally:
        logging.getLogger(name).setLevel(before)
    assert "sparse_serve.nobody" not in logging.Logger.manager.loggerDict


async def test_a_file_of_keys_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--admin-keys .*No such file"):
        async with running(admin_keys=str(tmp_path / "none")):
            pass
