"""Pages of other origins may read refusals as they may read vLLM's answers."""

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

from sparse_serve.engine.fake import FakeEngine
from sparse_serve.server.admission import Phase
from sparse_serve.server.cors import Cors
from tests.sparse_serve.running import running

PAGE = "https://page.example"
ALLOWED = "access-control-allow-origin"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


@pytest.mark.parametrize("origins", [["*"], [PAGE], ["https://other.example", PAGE], []])
@pytest.mark.parametrize("credentials", [False, True])
async def test_headers_are_those_that_vllms_middleware_gives(origins: list[str], credentials: bool) -> None:
    app = CORSMiddleware(PlainTextResponse("x"), allow_origins=origins, allow_credentials=credentials)
    for origin in (PAGE, "https://else.example", "null", None):
        asked = {} if origin is None else {"origin": origin}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            theirs = (await client.get("/", headers=asked)).headers
        ours = Cors(origins, credentials).headers(Headers(asked))
        assert ours.get(ALLOWED) == theirs.get(ALLOWED)
        if ALLOWED in ours:
            assert ours.get("access-control-allow-credentials") == theirs.get("access-control-allow-credentials")


@pytest.mark.parametrize("origins", [["*"], [PAGE], []])
@pytest.mark.parametrize("methods", [["*"], ["GET"]])
@pytest.mark.parametrize("headers", [["*"], ["authorization"], []])
async def test_preflights_are_answered_as_vllms_middleware_does(
    origins: list[str], methods: list[str], headers: list[str]
) -> None:
    limits = {"allow_origins": origins, "allow_methods": methods, "allow_headers": headers}
    app = CORSMiddleware(PlainTextResponse("x"), **limits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        theirs = await client.options("/", headers=PREFLIGHT)
    async with running() as server:
        server.server.context.listener.set_cors(lambda: Cors(origins, False, methods, headers))
        ours = await server.http.options("/v1/completions", headers=PREFLIGHT)
    names = [name for name in theirs.headers if name.startswith("access-control-")]
    assert [ours.headers[name] for name in names] == [theirs.headers[name] for name in names]
    assert (ours.status_code, ours.text) == (theirs.status_code, theirs.text)


async def test_a_page_reads_that_the_server_starts_and_that_its_engine_died() -> None:
    engine = FakeEngine(start_s=60.0)
    async with running(engine, ready=False) as server:
        listener = server.server.context.listener
        known: list[Cors] = []
        listener.set_cors(lambda: known[0] if known else None)
        early = asyncio.create_task(server.http.options("/v1/completions", headers=PREFLIGHT))
        await asyncio.sleep(0.3)
        assert not early.done()  # what pages may do is not known yet
        known.append(Cors([PAGE]))
        asked = await early
        assert (asked.status_code, asked.headers[ALLOWED]) == (200, PAGE)
        assert asked.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        refused = await server.http.post("/v1/completions", json={}, headers={"origin": PAGE})
        assert (refused.status_code, refused.headers[ALLOWED]) == (503, PAGE)
        other = {**PREFLIGHT, "origin": "https://else.example"}
        assert (await server.http.options("/v1/completions", headers=other)).status_code == 400
        server.server.context.admission.phase = Phase.DEAD
        assert (await server.http.options("/v1/completions", headers=PREFLIGHT)).status_code == 200


async def test_a_page_can_read_why_it_was_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key-0123456789")
    key, page = {"authorization": "Bearer first-key-0123456789"}, {"origin": PAGE}
    async with running(api_keys=str(tmp_path / "keys"), max_message_bytes=2048, max_header_bytes=2048) as server:
        server.server.context.listener.set_cors(lambda: Cors([PAGE]))
        ask = {"prompt": "ab", "max_tokens": 1}
        for status, headers, body in (
            (401, {}, ask),
            (413, key, {**ask, "user": "a" * 4096}),
            (400, {**key, "x-request-id": "no id"}, ask),
            (400, key, {**ask, "n": 10_000}),
            (431, {"x": "a" * 4096}, ask),
            (200, key, ask),
        ):
            for origin, allowed in ((page, PAGE), ({}, None), ({"origin": "https://else.example"}, None)):
                answer = await server.http.post("/v1/completions", json=body, headers=headers | origin)
                assert (answer.status_code, answer.headers.get(ALLOWED)) == (status, allowed)


async def test_a_server_that_drains_tells_pages_so() -> None:
    async with running(FakeEngine(delay_s=0.01)) as server:
        server.server.context.listener.set_cors(lambda: Cors(["*"]))
        call = asyncio.create_task(server.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 4000}))
        await server.until(lambda: server.engine.unfinished == 1)
        server.server.stop()
        await server.until(lambda: server.server.context.admission.phase is Phase.DRAINING)
        refused = await server.http.post("/v1/completions", json={}, headers={"origin": PAGE})
        assert (refused.status_code, refused.headers[ALLOWED]) == (503, "*")
        call.cancel()
