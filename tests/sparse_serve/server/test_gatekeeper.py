"""Who may come in, where to, and how an answer ends; with a fake engine."""

import asyncio
import json
from pathlib import Path

import grpc
import httpx
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.server.cors import Cors
from tests.sparse_serve.running import running

KEY, OTHER = "first-key-0123456789", "other-key-0123456789"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of a team\n{KEY}\n\n{OTHER}\n")
    return path


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/tokenize", "/version", "/v1/responses/../x", "/v1"])
async def test_only_paths_meant_for_clients_are_answered(path: str) -> None:
    async with running() as server:
        response = await server.http.get(path)
    assert response.status_code == 404 and response.json()["error"]["code"] == 404


async def test_more_paths_are_answered_when_asked_for() -> None:
    async with running(extra_routes="/docs, /version") as server:
        assert (await server.http.get("/version")).text == "/version"
        assert (await server.http.get("/tokenize")).status_code == 404
    async with running(extra_routes="all") as server:
        assert (await server.http.get("/tokenize")).status_code == 200
    with pytest.raises(SettingsError, match="--extra-routes: 'tokenize' is no path"):
        async with running(extra_routes="tokenize"):
            pass


async def test_what_has_no_limit_of_its_own_gets_a_smaller_body() -> None:
    async with running(extra_routes="/tokenize") as server:
        large = {"prompt": "ab", "max_tokens": 1, "user": "a" * (1 << 20)}
        assert (await server.http.post("/tokenize", json=large)).status_code == 413
        assert (await server.http.post("/v1/completions", json=large)).status_code == 200
        assert (await server.http.post("/tokenize", json={"prompt": "ab", "max_tokens": 1})).status_code == 200


async def test_nothing_but_probes_is_answered_without_a_key(keys: Path) -> None:
    async with running(api_keys=str(keys)) as server:
        for path in ("/ready", "/readyz", "/healthz"):
            assert (await server.http.get(path)).status_code == 200
        for path in ("/metrics", "/v1/models", "/sparse-serve/info", "/nothing"):
            response = await server.http.get(path)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for wrong in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", f"Bearer {KEY[:-1]}", "Bearer # of a team"):
            response = await server.http.post("/v1/completions", json={}, headers={"authorization": wrong})
            assert response.status_code == 401 and KEY not in response.text
        for right in (f"Bearer {KEY}", f"bearer {OTHER}"):
            response = await server.http.get("/sparse-serve/info", headers={"authorization": right})
            assert response.status_code == 200


async def test_keys_are_read_again_when_the_file_changes(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_serve.server.keys._LOOK_S", 0.0)
    async with running(api_keys=str(keys)) as server:
        new = "a-new-key-0123456789"
        keys.write_text(new)
        for key, status in ((new, 200), (KEY, 401)):
            response = await server.http.get("/metrics", headers={"authorization": f"Bearer {key}"})
            assert response.status_code == status
        keys.write_text("")
        response = await server.http.get("/metrics", headers={"authorization": f"Bearer {new}"})
        assert response.status_code == 200, "a file without a key locks nobody out, and lets nobody in"
        assert (await server.http.get("/metrics")).status_code == 401


async def test_grpc_asks_for_the_same_keys_health_checks_apart(keys: Path) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with running(api_keys=str(keys)) as server:
        health = await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        for metadata in ((), (("authorization", f"Bearer {KEY}x"),)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await server.stub.Generate(pb.GenerateRequest(text="a"), metadata=(*metadata, ("x-request-id", "mine")))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            trailing = dict(refused.value.trailing_metadata())
            assert trailing["x-request-id"] == "mine" and b"UNAUTHENTICATED" in trailing["grpc-status-details-bin"]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in server.stub.GenerateStream(pb.GenerateStreamRequest(text="a"), metadata=metadata):
                    pass
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(
                iter([listing])
            ):
                pass
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        sampling = pb.Sampling(max_tokens=2)
        answer = await server.stub.Generate(
            pb.GenerateRequest(text="ab", sampling=sampling), metadata=(("authorization", f"Bearer {KEY}"),)
        )
        assert answer.text == "ab"
    refusals = server.metric("sparse_serve_requests_total", api="grpc", method="Generate", code="UNAUTHENTICATED")
    assert refusals == 2


@pytest.mark.parametrize("content", ["", "# only a remark\n", "short\n", "two words of a long line\n"])
def test_a_file_without_a_good_key_is_refused(content: str, tmp_path: Path) -> None:
    from sparse_serve.server.keys import Keys

    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"--api-keys .*expected one key in each line, of at least 16"):
        Keys(path)
    with pytest.raises(SettingsError, match=r"--api-keys .*No such file"):
        Keys(tmp_path / "none")


async def test_an_id_goes_through_or_is_made() -> None:
    async with running() as server:
        given = await server.http.get("/health", headers={"x-request-id": "abc-1_Z"})
        assert given.headers["x-request-id"] == "abc-1_Z"
        made = [(await server.http.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert len({*made}) == 2 and all(len(id_) == 32 for id_ in made)
        for wrong in ("a b", "x" * 65, "ü", "a;b"):
            response = await server.http.get("/health", headers={"x-request-id": wrong.encode()})
            assert response.status_code == 400 and "X-Request-Id" in response.json()["error"]["message"]
            assert len(response.headers["x-request-id"]) == 32
        assert len((await server.http.get("/readyz")).headers["x-request-id"]) == 32


async def test_one_client_cannot_take_everything(keys: Path) -> None:
    mine, yours = ({"authorization": f"Bearer {key}"} for key in (KEY, OTHER))
    async with running(FakeEngine(delay_s=0.05), api_keys=str(keys), max_sequences_per_client=2) as server:
        body = {"prompt": "ab", "max_tokens": 20}
        running_now = [
            asyncio.create_task(server.http.post("/v1/completions", json=body, headers=mine)) for _ in range(2)
        ]
        await server.until(lambda: server.engine.unfinished == 2)
        refused = await server.http.post("/v1/completions", json=body, headers=mine)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "2 sequences running" in refused.json()["error"]["message"]
        with pytest.raises(grpc.aio.AioRpcError) as over_grpc:
            await server.stub.Generate(pb.GenerateRequest(text="a"), metadata=tuple(mine.items()))
        assert over_grpc.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        short = {"prompt": "ab", "max_tokens": 2}
        assert (await server.http.post("/v1/completions", json=short, headers=yours)).text == "ab"
        assert [(await task).status_code for task in running_now] == [200, 200]
        assert (await server.http.post("/v1/completions", json=short, headers=mine)).text == "ab"
    assert server.metric("sparse_serve_client_rejections_total") == 2


async def test_one_grpc_connection_cannot_take_everything() -> None:
    async with running(FakeEngine(delay_s=0.05), max_sequences_per_client=3) as server:
        request = pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=8))
        codes = await asyncio.gather(*(server.stub.Generate(request).code() for _ in range(5)))
    assert sorted(code.name for code in codes) == ["OK"] * 3 + ["RESOURCE_EXHAUSTED"] * 2


async def test_a_client_cannot_say_that_it_is_another() -> None:
    async with running(FakeEngine(delay_s=0.05), max_sequences_per_client=1) as server:
        headers = {"x-forwarded-for": "192.0.2.7"}
        body = {"prompt": "ab", "max_tokens": 10}
        answers = await asyncio.gather(
            *(server.http.post("/v1/completions", json=body, headers=headers) for _ in range(3))
        )
    assert [answer.status_code for answer in answers] == [200] * 3, "three connections are three clients"


async def test_what_a_client_can_never_have_is_not_to_be_tried_again() -> None:
    async with running(max_sequences_per_client=2) as server:
        response = await server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "n": 3})
    assert response.status_code == 400 and "retry-after" not in response.headers


async def test_too_much_in_one_body_is_refused() -> None:
    async with running(max_sequences=4) as server:
        response = await server.http.post("/v1/completions", json={"prompt": ["a"] * 5, "max_tokens": 1})
    assert response.status_code == 400 and "5 sequences" in response.json()["error"]["message"]
    assert server.metric("sparse_serve_requests_total", api="http", method="POST", code="400") == 1


async def test_what_is_cut_off_at_the_end_of_a_drain_is_told() -> None:
    async with running(FakeEngine(delay_s=0.05), drain_s=0.2) as server:
        task = asyncio.create_task(server.http.post("/v1/completions?sse", json={"prompt": "ab", "max_tokens": 4000}))
        await server.until(lambda: server.engine.unfinished == 1)
        server.server.stop()
        response = await task
    assert response.status_code == 200
    assert response.text.startswith("ab") and response.text.endswith("data: [DONE]\n\n")
    (event,) = [line for line in response.text.splitlines() if "data: {" in line]
    assert json.loads(event.partition("data: ")[2])["error"]["code"] == 503
    assert server.engine.unfinished == 0 and len(server.engine.aborted) == 1
    assert server.metric("sparse_serve_cancelled_total", api="http") == 0, "the client did not cancel"


async def test_what_has_no_answer_yet_at_the_end_of_a_drain_gets_503() -> None:
    async with running(FakeEngine(delay_s=0.05), drain_s=0.2) as server:
        task = asyncio.create_task(server.http.post("/v1/completions?late", json={"prompt": "ab", "max_tokens": 4000}))
        await server.until(lambda: server.engine.unfinished == 1)
        server.server.stop()
        response = await task
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "going down" in response.json()["error"]["message"]


async def test_a_streamed_get_is_waited_for_and_cut_off_too() -> None:
    async with running(FakeEngine(delay_s=0.05), drain_s=0.3) as server:
        task = asyncio.create_task(server.http.get("/v1/responses/resp_1?sse"))
        await server.until(lambda: server.engine.unfinished == 1)
        server.server.stop()
        response = await task
    assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
    assert '"code": 503' in response.text and len(server.engine.aborted) == 1


async def test_a_browser_may_ask_without_a_key_what_a_page_may_do(keys: Path) -> None:
    preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}
    async with running(api_keys=str(keys)) as server:
        server.server.context.listener.set_cors(lambda: Cors(["*"]))
        for path in ("/v1/chat/completions", "/sparse-serve/info"):
            assert (await server.http.options(path, headers=preflight)).status_code == 200
        assert (await server.http.options("/docs", headers=preflight)).status_code == 404
        for lacks in preflight:
            headers = {name: value for name, value in preflight.items() if name != lacks}
            assert (await server.http.options("/v1/chat/completions", headers=headers)).status_code == 401
        assert (await server.http.post("/v1/completions", json={}, headers=preflight)).status_code == 401


async def test_a_dead_engine_is_503_on_every_path_and_never_500() -> None:
    async with running(FakeEngine(delay_s=0.02)) as server:
        task = asyncio.create_task(server.http.post("/v1/completions?late", json={"prompt": "ab", "max_tokens": 4000}))
        await server.until(lambda: server.engine.unfinished == 1)
        server.engine.die()
        response = await task
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        await server.until(lambda: server.server.context.admission.phase.value == "dead")
        for path in ("/health", "/v1/models", "/readyz", "/healthz"):
            try:
                assert (await server.http.get(path)).status_code == 503
            except httpx.TransportError:
                break
