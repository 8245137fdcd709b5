"""The engine on its own, as the gate uses it: scores, and kernels that cannot serve."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_serve.engine import Chunk, GenerateRequest, Origin, Sampling, vllm_requests
from sparse_serve.engine.pace import Pace
from sparse_serve.engine.vllm_engine import VllmEngine
from sparse_serve.engine.vllm_progress import StepLogger
from sparse_serve.runtime import turns
from sparse_serve.runtime.errors import BadRequestError, EngineStartError
from tests import models
from tests.vllm.serving import SHAPE, SPARSE_LAYERS, command_of, descendants, is_alive, make_checkpoint


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--dtype=float32"], "skinny: device cpu is not an NVIDIA GPU, dtype torch.float32 is not one of"),
        (["--tensor-parallel-size=2", "--dtype=bfloat16"], "skinny: device cpu is not an NVIDIA GPU$"),
    ],
)
async def test_a_kernel_that_cannot_serve_is_an_error_with_its_reasons(
    flags: list[str], why: str, tmp_path: Path
) -> None:
    forced = json.dumps({"sparse_nm": {"kernel": "skinny"}})
    engine = VllmEngine(str(make_checkpoint(tmp_path)), [f"--additional-config={forced}", *flags])
    with pytest.raises(EngineStartError, match=f"the engine did not start: no kernel for a 2:4 weight.*{why}"):
        await engine.start()


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (ValueError, BadRequestError),
        (TypeError, BadRequestError),
        (OverflowError, BadRequestError),
        (KeyError, KeyError),
    ],
)
async def test_what_vllms_http_api_calls_the_clients_fault_is_so_in_a_chat(
    raised: type[Exception], becomes: type[Exception]
) -> None:
    async def create_chat_completion(request: Any, raw_request: Any) -> Any:
        assert raw_request.headers["x-request-id"] == "mine"
        raise raised("why")

    serving = SimpleNamespace(create_chat_completion=create_chat_completion)
    body = {"messages": [{"role": "user", "content": "a"}], "seed": -1}
    with pytest.raises(becomes, match="why"):
        [_ async for _ in vllm_requests.chat(None, serving, body, Origin("mine"))]


async def test_a_probe_asks_every_replica_and_waits_for_all() -> None:
    asked, aborted = [], []

    async def add_request(name: str, prompt: Any, params: Any, *, data_parallel_rank: int) -> Any:
        asked.append(data_parallel_rank)

        async def get() -> Any:
            await asyncio.sleep(60 if data_parallel_rank == 2 else 0)
            return SimpleNamespace(finished=True)

        return SimpleNamespace(get=get, request_id=name)

    async def abort(request_id: str, internal: bool) -> None:
        assert internal
        aborted.append(request_id)

    parallel = SimpleNamespace(data_parallel_size=3)
    config = SimpleNamespace(parallel_config=parallel)
    model = SimpleNamespace(runner_type="generate")
    client = SimpleNamespace(add_request=add_request, abort=abort, vllm_config=config, model_config=model)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(vllm_requests.probe(client), 0.3)
    assert sorted(asked) == [0, 1, 2] and len(aborted) == 1


def test_the_last_step_is_that_of_the_replica_that_has_made_none_for_longest() -> None:
    progress = VllmEngine("owner/model").progress
    loggers = [StepLogger(progress, None, index) for index in range(2)]
    began_s = time.monotonic()
    loggers[0].record(None, SimpleNamespace(num_prompt_tokens=3, num_generation_tokens=2))
    assert progress.last_step_s < began_s
    loggers[1].record(None, None)
    assert progress.last_step_s >= began_s
    assert (progress.prompt_tokens, progress.generated_tokens) == (3, 2)


async def ended_before_a_newcomer(engine: VllmEngine, others: int) -> int:
    """How many of the `others` requests that one client has there end before the one that another then sends."""
    ended: list[int] = []

    async def request(number: int) -> None:
        turns.enter(number, number + 1)
        wanted = GenerateRequest("to be", Sampling(max_tokens=8, temperature=0.0, ignore_eos=True))
        async for _ in engine.generate(wanted):
            pass
        ended.append(number)

    tasks = [asyncio.create_task(request(1 + number)) for number in range(others)]
    await asyncio.sleep(0.05)
    newcomer = asyncio.create_task(request(0))
    await asyncio.gather(*tasks, newcomer)
    return ended.index(0)


async def tokens(engine: VllmEngine, start: int, count: int) -> list[int]:
    """Greedy tokens of a request that is due after `start`."""
    turns.enter(start, start + 1)
    wanted = GenerateRequest("to be", Sampling(max_tokens=count, temperature=0.0, ignore_eos=True))
    return [token async for chunk in engine.generate(wanted) for token in chunk.token_ids]


async def check_that_a_newcomer_does_not_wait_for_the_end_of_those_that_run(engine: VllmEngine) -> None:
    """All places are taken, by long requests; one of them is put aside and goes on as if it had not been."""
    alone = await tokens(engine, 1, 500)
    long = [asyncio.create_task(tokens(engine, start, 500)) for start in (1, 2)]
    await asyncio.sleep(0.1)
    assert await tokens(engine, 0, 8) == alone[:8]
    assert not any(task.done() for task in long)
    assert await asyncio.gather(*long) == [alone, alone]


async def has_begun_when_cancelled(engine: VllmEngine, start: int) -> bool:
    """Whether a request that is due after `start`, and cancelled after a moment, has had its turn."""
    entered: list[turns.Turns] = []

    async def request() -> None:
        entered.append(turns.enter(start, start + 1))
        wanted = GenerateRequest("to be", Sampling(max_tokens=500, temperature=0.0, ignore_eos=True))
        async for _ in engine.generate(wanted):
            pass

    task = asyncio.create_task(request())
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return entered[0].have_begun


async def check_that_one_cancelled_in_the_queue_has_had_no_turn(engine: VllmEngine) -> None:
    assert await has_begun_when_cancelled(engine, 1)
    long = [asyncio.create_task(tokens(engine, start, 900)) for start in (1, 2)]
    await asyncio.sleep(0.1)
    assert not await has_begun_when_cancelled(engine, 3)
    assert not any(task.done() for task in long)
    await asyncio.gather(*long)


async def check_that_paced_streams_have_the_same_tokens(engine: VllmEngine) -> None:
    """In fewer chunks: the first at once, and each later one with what was made since the one before."""
    from sparse_serve.engine import vllm_pace

    async def answer(number: int) -> list[Chunk]:
        sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True, logprobs=0)
        return [chunk async for chunk in engine.generate(GenerateRequest((5, 9, 17 + number), sampling))]

    def tokens(answers: list[list[Chunk]]) -> list[list[int]]:
        return [[id_ for chunk in chunks for id_ in chunk.token_ids] for chunks in answers]

    asked = range(8)
    plain = await asyncio.gather(*map(answer, asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.async_llm.RequestOutputCollector", None)
        vllm_pace.install(Pace(100))
        paced = await asyncio.gather(*map(answer, asked))
    assert tokens(paced) == tokens(plain)
    assert sum(map(len, paced)) < 0.7 * sum(map(len, plain))
    for chunks in paced:
        assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
        assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].completion_tokens == 40 and "".join(chunk.text for chunk in chunks)


async def test_scores_are_those_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The engine as the gate uses it, and a dense float32 model, which "auto" must not turn into bfloat16.

    That it is stopped is no accident, for which vLLM's client of the engine would take it.
    """
    log = logging.getLogger("vllm.v1.engine.async_llm")
    log.addHandler(caplog.handler)
    dense = models.build("llama", **SHAPE)
    models.save("llama", tmp_path / "dense", **SHAPE)
    engine = VllmEngine(str(tmp_path / "dense"), ["--max-num-seqs=2"])
    family = descendants(os.getpid())
    try:
        info = await engine.start()
        family = descendants(os.getpid()) - family
        engines = [pid for pid in family if "EngineCore" in command_of(pid)]
        assert (info.dtype, info.sparse_layers, info.dense_layers) == ("float32", 0, SPARSE_LAYERS)
        ids = models.tokenizer().encode(models.TEXT, add_special_tokens=False)[:400]
        scores = await engine.score(ids)
        with pytest.raises(BadRequestError, match="expected 2 to 1023"):
            await engine.score([5])
        assert await ended_before_a_newcomer(engine, others=20) < 10
        await check_that_a_newcomer_does_not_wait_for_the_end_of_those_that_run(engine)
        await check_that_one_cancelled_in_the_queue_has_had_no_turn(engine)
        await check_that_paced_streams_have_the_same_tokens(engine)
    finally:
        await engine.stop(5.0)
        log.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    with torch.no_grad():
        logits = dense(torch.tensor([ids])).logits[0].float()
    expected = logits.log_softmax(-1)[range(399), ids[1:]]
    assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert engines and not any(map(is_alive, engines))
