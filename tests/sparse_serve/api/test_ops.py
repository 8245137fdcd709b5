"""Operations over HTTP."""

from sparse_serve.engine.fake import INFO, FakeEngine
from tests.sparse_serve.running import running


async def test_ready_follows_the_phase() -> None:
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        response = await server.http.get("/ready")
        assert (response.status_code, response.json()["phase"]) == (503, "starting")
        server.engine.start_over.set()
        await server.until(lambda: server.is_ready)
        assert (await server.http.get("/ready")).status_code == 200
        server.engine.delay_s = 0.05
        async with server.http.stream("POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 10}):
            server.server.stop()
            await server.until(lambda: server.metric("sparse_serve_ready") == 0)
            response = await server.http.get("/ready")
            assert (response.status_code, response.json()) == (503, {"phase": "draining", "in_flight": 1})


async def test_info_shows_engine_and_settings_once_started() -> None:
    async with running(FakeEngine(start_s=1000.0), ready=False, max_stop=5) as server:
        assert (await server.http.get("/sparse-serve/info")).json()["engine"] is None
        server.engine.start_over.set()
        await server.until(lambda: server.is_ready)
        info = (await server.http.get("/sparse-serve/info")).json()
    assert info["engine"]["kernels"] == {"reference": 2, "cpu": 1}
    assert "settings" not in info
    quality = info["engine"]["quality"]
    assert (quality["dense_perplexity"], quality["perplexity"], quality["kl"]) == (20.0, 50.0, 0.75)
    assert INFO.quality is not None and quality["advice"] == INFO.quality.advice() != []
    assert quality["texts"] == ["a.txt"] and quality["bad"]
