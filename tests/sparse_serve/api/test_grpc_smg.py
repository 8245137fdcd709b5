"""What of the routers' protocol needs no model; the rest is in tests/vllm/test_smg.py."""

import os

import grpc
import pytest

from sparse_serve.api.grpc_calls import Calls
from sparse_serve.api.grpc_smg import VllmEngineService
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine.fake import FakeEngine
from tests.sparse_serve.running import running

pytest.importorskip("smg_grpc_proto", reason="the extra smg is not installed")
from smg_grpc_proto import vllm_engine_pb2 as smg
from smg_grpc_proto import vllm_engine_pb2_grpc as services


async def test_without_keys_requests_are_their_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmEngineService, "connect", lambda service: None)
    alone = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        running(FakeEngine(delay_s=0.01), smg=True) as server,
        grpc.aio.insecure_channel(server.grpc_address, options=alone) as other,
    ):
        request = pb.GenerateStreamRequest(text="ab", sampling=pb.Sampling(max_tokens=4000))
        call = server.stub.GenerateStream(request, metadata=(("x-request-id", "mine"),))
        await call.read()
        abort = smg.AbortRequest(request_ids=["mine"])
        await services.VllmEngineStub(other).Abort(abort)
        for _ in range(20):
            await call.read()
        await services.VllmEngineStub(server.channel).Abort(abort)
        with pytest.raises(grpc.aio.AioRpcError, match="ABORTED"):
            while await call.read() is not grpc.aio.EOF:
                pass


@pytest.mark.parametrize(("given", "found"), [(None, "off"), ("fast", "fast")])
async def test_its_own_warm_up_does_not_run_beside_clients(
    given: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless somebody asks for it. The servicer looks at the variable when it is made."""
    servicer = pytest.importorskip("smg_grpc_servicer.vllm.servicer")
    from smg_grpc_servicer.vllm.warmup import WARMUP_ENV

    from sparse_serve.engine.vllm_engine import VllmEngine

    levels = []
    monkeypatch.setattr(servicer, "VllmEngineServicer", lambda client, since_s: levels.append(os.environ[WARMUP_ENV]))
    monkeypatch.setenv(WARMUP_ENV, given or "")
    if given is None:
        monkeypatch.delenv(WARMUP_ENV)
    async with running(smg=False) as server:
        calls = Calls(server.server.context)
        monkeypatch.setattr(server.server.context, "engine", VllmEngine("owner/model"))
        VllmEngineService(calls).connect()
        monkeypatch.undo()
    assert levels == [found]
