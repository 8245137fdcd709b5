"""The page at `/`. That it works in a browser, on the real engine, is tested in `tests/vllm/test_services.py`."""

import base64
import hashlib
import re

from sparse_serve.api.landing import policy
from sparse_serve.engine.fake import FakeEngine
from tests.sparse_serve.running import running


async def test_the_page_is_there_in_every_phase_and_needs_nothing_from_elsewhere() -> None:
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        early = await server.http.get("/")
        server.engine.start_over.set()
        await server.until(lambda: server.is_ready)
        late = await server.http.get("/")
        assert (await server.http.head("/")).status_code == 200
        assert (await server.http.post("/")).status_code == 405
    assert early.status_code == late.status_code == 200
    assert early.text == late.text
    assert late.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"(?:src|href)=\"(?!data:)[^\"]*|url\(|@import|https?://", late.text) == []


async def test_a_browser_may_run_what_is_on_the_page_and_nothing_else() -> None:
    async with running(FakeEngine()) as server:
        answer = await server.http.get("/")
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert (rules["default-src"], rules["connect-src"]) == ("'none'", "'self'")
    assert not re.search(r"\son\w+=|style=", answer.text), "the policy refuses code and style in attributes"
    assert policy("<script>1</script><style></style>") != policy("<script>2</script><style></style>")


async def test_info_counts_tokens_and_requests() -> None:
    async with running(FakeEngine()) as server:
        server.engine.progress.prompt_tokens, server.engine.progress.generated_tokens = 5, 7
        load = (await server.http.get("/sparse-serve/info")).json()["load"]
    assert load == {"in_flight": 0, "prompt_tokens": 5, "generated_tokens": 7}
