"""What of the routers' protocol needs no model; the rest is in tests/vllm/test_smg.py."""

import grpc
import pytest

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
