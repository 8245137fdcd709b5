"""Which running requests are put aside for which waiting ones, by vLLM's own scheduler too, without an engine.

That they give the same tokens as if they had not been is tested on one (test_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import models
from tests.vllm.serving import SHAPE

READING = {"is_prefill_chunk": True}
LOGPROBS = {"sampling_params": SimpleNamespace(prompt_logprobs=0)}
POOLING = {"sampling_params": None}


def request(priority: int, status: str = "RUNNING", **other: Any) -> SimpleNamespace:
    from vllm.v1.request import RequestStatus

    given = {"num_preemptions": 0, "is_prefill_chunk": False, "sampling_params": SimpleNamespace(prompt_logprobs=None)}
    return SimpleNamespace(
        priority=priority,
        status=RequestStatus[status],
        arrival_time=-priority,
        request_id=str(priority),
        **given | other,
    )


def waiting(*priorities: int, status: str = "WAITING") -> list[SimpleNamespace]:
    return [request(priority, status) for priority in priorities]


def put_aside(running: list[SimpleNamespace], queue: list[SimpleNamespace], places: int = 0) -> list[int]:
    """Priorities of those that are, of `running` ones in so many places (0: all are taken)."""
    from sparse_serve.plugin.scheduler import make_room

    found: list[int] = []
    scheduler = SimpleNamespace(
        running=list(running),
        waiting=queue,
        max_num_active_reqs=places or len(running),
        num_waiting_for_streaming_input=0,
        requires_kv_delivery=False,
        prev_step_scheduled_req_ids={other.request_id for other in running},
        _request_blocks_can_be_freed=lambda other: other.priority != 77,
        _preempt_request=lambda other, now_s, drop_stale_output: found.append(other.priority),
    )
    make_room(scheduler)
    assert sorted(found + [other.priority for other in scheduler.running]) == sorted(r.priority for r in running)
    assert not {str(priority) for priority in found} & scheduler.prev_step_scheduled_req_ids
    return found


def running(*priorities: int, **other: Any) -> list[SimpleNamespace]:
    return [request(priority, **other) for priority in priorities]


def test_those_due_last_make_room_for_those_due_before_them() -> None:
    assert put_aside(running(1, 9, 5), waiting(3)) == [9]
    assert put_aside(running(1, 9, 5), waiting(4, 3)) == [9, 5]
    assert put_aside(running(1, 9, 5), waiting(3, 7)) == [9]
    assert put_aside(running(1, 9, 5), waiting(*range(20, 40))) == []
    assert put_aside(running(5, 5, 5), waiting(5)) == [], "among equals, who runs goes on"


def test_nobody_is_put_aside_while_there_are_places_or_for_one_that_cannot_run() -> None:
    assert put_aside(running(9, 9), waiting(1), places=3) == []
    blocked = waiting(1, status="WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR")
    assert put_aside(running(9, 9), blocked) == []


def test_who_would_lose_more_than_a_place_keeps_it() -> None:
    for other in (READING, LOGPROBS, POOLING, {"num_preemptions": 3}):
        assert put_aside([*running(9, **other), *running(8)], waiting(1, 2)) == [8]
        assert put_aside(running(9, **other), waiting(1)) == []
    assert put_aside(running(77, 8), waiting(1)) == [8], "its blocks are still written to"


@pytest.fixture
def scheduler(tmp_path: Path) -> Any:
    """vLLM's, of four places, with turns."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from sparse_serve.plugin.scheduler import TurnScheduler

    models.save("llama", tmp_path / "dense", **SHAPE)
    flags = {"max_num_seqs": 4, "scheduling_policy": "priority", "enforce_eager": True}
    config = EngineArgs(model=str(tmp_path / "dense"), **flags).create_engine_config()
    config.cache_config.num_gpu_blocks = 100
    size = config.cache_config.block_size
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["a"], spec)])
    manager = StructuredOutputManager(config)
    return TurnScheduler(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=manager, block_size=size, log_stats=True
    )


@pytest.fixture
def add(scheduler: Any) -> Callable[[str, int, int], None]:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    def added(name: str, priority: int, count: int) -> None:
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        scheduler.add_request(
            Request(name, [1, 2, 3], params, None, arrival_time=len(scheduler.requests), priority=priority)
        )

    return added


def step(scheduler: Any) -> set[str]:
    """One step, in which every request gets token 5; the requests that were in it."""
    from vllm.v1.outputs import ModelRunnerOutput

    planned = scheduler.schedule()
    names = list(planned.num_scheduled_tokens)
    places = {name: place for place, name in enumerate(names)}
    made = ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=[[5] for _ in names])
    scheduler.update_from_output(planned, made)
    return set(names)


def test_a_newcomer_runs_in_the_next_step_and_all_come_to_their_end(scheduler: Any, add: Callable[..., None]) -> None:
    for number in range(6):
        add(f"flood {number}", priority=8 + number, count=20)
    assert step(scheduler) == step(scheduler) == {f"flood {number}" for number in range(4)}
    add("newcomer", priority=1, count=2)
    assert step(scheduler) == step(scheduler) == {"newcomer", "flood 0", "flood 1", "flood 2"}
    aside = scheduler.requests["flood 3"]
    assert (aside.num_preemptions, aside.num_output_tokens) == (1, 2)
    steps = 0
    while scheduler.requests:
        step(scheduler)
        steps += 1
    assert 20 <= steps <= 45 and aside.num_output_tokens == 20
