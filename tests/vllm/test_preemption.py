"""A request that is preempted for its turn goes on as if it had not been: the same tokens, from vLLM's own engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.offline import make_sparse, serve

LENGTH = 44
TEXT = [5, 9, 17, 33, 65, 129, 7, 70]
GUESSES = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


LONG = {"free": (TEXT, ""), "bound": (TEXT[::-1], "([a-e] ?){200}")}
"""Prompts, and the regular expressions that bind their answers."""


def sampling(count: int, regex: str = "") -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    form = StructuredOutputsParams(regex=regex) if regex else None
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, structured_outputs=form)


def tokens(engine: Any, arrivals: dict[int, list[str]]) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Tokens of the long requests, and how often everyone was preempted; `arrivals`: who comes before which step."""
    found: dict[str, list[int]] = {}
    times: dict[str, int] = {}
    scheduler = engine.engine_core.engine_core.scheduler
    for step in range(1000):
        for name in arrivals.get(step, []):
            ids, regex = LONG.get(name, (TEXT[:3], ""))
            params = sampling(LENGTH if name in LONG else 4, regex)
            engine.add_request(name, {"prompt_token_ids": ids}, params, priority=5 + len(name) if name in LONG else 1)
        outputs = engine.step()
        if not outputs:
            time.sleep(0.03)  # a grammar is compiled beside the engine, which waits for it
        for output in outputs:
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        for request in scheduler.requests.values():
            times[request.request_id.rpartition("-")[0]] = request.num_preemptions
        if step > max(arrivals) and not engine.has_unfinished_requests():
            return {name: found[name] for name in LONG if name in found}, times
    raise AssertionError(f"ended: {list(found)}")


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "read again"])
@pytest.mark.parametrize("options", [{}, {"speculative_config": GUESSES}], ids=["plain", "with guesses"])
def test_the_tokens_are_those_of_a_request_that_was_never_preempted(
    tmp_path: Path, caching: bool, options: dict[str, Any]
) -> None:
    sparse, _ = make_sparse("llama", tmp_path)
    turns = {"scheduling_policy": "priority", "scheduler_cls": "sparse_serve.plugin.scheduler.TurnScheduler"}
    with serve(sparse, enable_prefix_caching=caching, block_size=32, max_num_seqs=2, **turns, **options) as llm:
        alone: dict[str, list[int]] = {}
        for name in LONG:
            alone |= tokens(llm.llm_engine, {0: [name]})[0]
        arrivals = {0: [*LONG], 6: ["one", "two"], 32: ["three"], 33: ["four"]}
        together, times = tokens(llm.llm_engine, arrivals)
    assert together == alone
    assert {len(ids) for ids in alone.values()} == {LENGTH}
    assert times == {"free": 2, "bound": 2, "one": 0, "two": 0, "three": 0, "four": 0}
