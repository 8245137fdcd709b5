"""Tensor parallelism through our engine: two ranks say what one says, their layers are counted once, and the kernels of
both are compared."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path

import pytest

from sparse_serve.engine import EngineInfo, GenerateRequest, Sampling
from sparse_serve.engine.vllm_engine import VllmEngine
from sparse_serve.gate.checks import kernels
from sparse_serve.gate.evidence import Evidence, Limits
from sparse_serve.gate.verdict import Verdict
from sparse_serve.runtime import environment
from sparse_serve.server.watchdog import until_hung
from sparse_serve.tuning import parity_file
from tests import models
from tests.vllm.serving import SHAPE, SPARSE_LAYERS, is_alive

# On each of two ranks still whole blocks of a kernel's layout, so that the ranks hold together what one holds alone.
WHOLE_BLOCKS = SHAPE | {"hidden_size": 256, "intermediate_size": 256}
PROMPTS = [(5, 9, 17, 33, 65, 129, 7, 70), (200, 100, 50, 25), (300, 3, 30)]


async def greedy(model: Path, ranks: int) -> tuple[EngineInfo, list[tuple[int, ...]]]:
    engine = VllmEngine(str(model), ["--tensor-parallel-size", str(ranks), "--max-model-len", "64"])
    try:
        info = await engine.start()
        tokens = []
        for prompt in PROMPTS:
            request = GenerateRequest(prompt, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
            tokens.append(tuple([id_ async for chunk in engine.generate(request) for id_ in chunk.token_ids]))
        return info, tokens
    finally:
        await engine.stop(5.0)


async def test_two_ranks_give_the_tokens_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2: biases on query, key and value are split over the ranks together with the packed outputs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    models.save("qwen2", tmp_path / "dense", **WHOLE_BLOCKS)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    one, expected = await greedy(tmp_path / "sparse", 1)
    with environment.kernel_parity(tmp_path):
        two, tokens = await greedy(tmp_path / "sparse", 2)
    assert len({id_ for sequence in expected for id_ in sequence}) > 6, "a constant output would hide a mistake"
    assert tokens == expected
    assert one.sparse_layers == SPARSE_LAYERS
    assert one.choices and two.choices
    told = dataclasses.replace(two, model=one.model, choices=one.choices, startup_s=one.startup_s)
    assert told == one, "but for what was measured"

    found = parity_file.read(tmp_path)
    assert len({(part.layer, part.rank) for part in found}) == 2 * SPARSE_LAYERS
    assert {part.ranks for part in found} == {2}
    results = kernels.run(Evidence(kernels={"candidate": found}, candidate_engine=two), Limits())
    assert {result.verdict for result in results} == {Verdict.PASS}, results


async def test_replicas_share_requests_and_all_end_with_one_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    models.save("qwen2", tmp_path / "dense", **WHOLE_BLOCKS)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    engine = VllmEngine(str(tmp_path / "sparse"), ["--data-parallel-size=2", "--max-model-len=64"])

    async def answer() -> tuple[int, ...]:
        request = GenerateRequest(PROMPTS[0], Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
        return tuple([id_ async for chunk in engine.generate(request) for id_ in chunk.token_ids])

    try:
        info = await engine.start()
        assert info.sparse_layers == SPARSE_LAYERS
        answers = await asyncio.gather(*(answer() for _ in range(8)))
        assert len(set(answers)) == 1
        replicas = [process.pid for process in engine.client.engine_core.resources.engine_manager.processes]
        assert len(replicas) == 2
        os.kill(replicas[1], signal.SIGKILL)
        async with asyncio.timeout(120):
            while not engine.died:
                await asyncio.sleep(0.1)
    finally:
        await engine.stop(5.0)
    assert not any(map(is_alive, replicas))


async def test_a_replica_that_hangs_is_found_though_the_others_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that makes embeddings; what asks those that generate is the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    models.save("qwen2", tmp_path / "dense", **WHOLE_BLOCKS)
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    flags = ["--runner=pooling", "--convert=embed", "--data-parallel-size=2", "--max-model-len=64"]
    engine = VllmEngine(str(tmp_path / "sparse"), flags)
    try:
        assert (await engine.start()).embeds
        replicas = [process.pid for process in engine.client.engine_core.resources.engine_manager.processes]
        watching = asyncio.create_task(until_hung(engine, 4.0))
        await asyncio.sleep(6.0)
        assert not watching.done()
        os.kill(replicas[1], signal.SIGSTOP)
        async with asyncio.timeout(120):
            await watching
        assert not engine.died
    finally:
        await engine.stop(0.0)
    assert not any(map(is_alive, replicas))
