"""vLLM's queue in the order of turns, unless its flags name an order."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_serve.engine import vllm_turns
from sparse_serve.runtime import turns


def processor(states: dict[str, Any], parents: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(request_states=states, parent_requests=parents or {})


@pytest.mark.parametrize(
    ("policy", "expected"), [(None, [4, 8, 9]), ("fcfs", [-5, -5, -5]), ("priority", [-5, -5, -5])]
)
async def test_the_priority_is_the_turn_where_requests_take_turns(policy: str | None, expected: list[int]) -> None:
    found = []

    async def add_request(request_id: str, prompt: Any, params: Any, *, priority: int = 0) -> Any:
        found.append(priority)
        return SimpleNamespace(request_id=request_id)

    client = SimpleNamespace(add_request=add_request, output_processor=processor({}))
    args = Namespace(scheduling_policy=policy)
    vllm_turns.set_policy(args)
    assert args.scheduling_policy == (policy or "priority")
    vllm_turns.install(client, args)
    turns.enter(3, 9)
    for params in (SimpleNamespace(n=1), SimpleNamespace(n=4), SimpleNamespace()):
        assert (await client.add_request("id", "prompt", params, priority=-5)).request_id == "id"
    assert found == expected


@pytest.mark.parametrize("parents", [{}, {"id": SimpleNamespace(child_requests={"0_id", "1_id"})}])
async def test_a_request_has_begun_with_the_first_token_of_any_sequence(parents: dict[str, Any]) -> None:
    """Or if none is left of it, as when it has ended."""
    states = {name: SimpleNamespace(is_prefilling=True) for name in ("id", "0_id", "1_id", "other")}

    async def add_request(request_id: str, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(request_id=request_id)

    client = SimpleNamespace(add_request=add_request, output_processor=processor(states, parents))
    vllm_turns.install(client, Namespace(takes_turns=True))
    entered = turns.enter(0, 2)
    await client.add_request("id", "prompt", SimpleNamespace(n=2))
    states["other"].is_prefilling = False
    assert not entered.have_begun
    states["1_id" if parents else "id"].is_prefilling = False
    assert entered.have_begun
    after = turns.enter(2, 3)
    await client.add_request("gone", "prompt", SimpleNamespace(n=1))
    assert after.have_begun


@pytest.mark.parametrize(
    ("takes", "named", "is_async", "expected"),
    [
        (True, None, False, "sparse_serve.plugin.scheduler.TurnScheduler"),
        (True, None, True, "sparse_serve.plugin.scheduler.AsyncTurnScheduler"),
        (True, "other.Scheduler", True, "other.Scheduler"),
        (False, None, False, None),
    ],
)
def test_the_scheduler_is_that_of_turns(takes: bool, named: str | None, is_async: bool, expected: str | None) -> None:
    scheduling = SimpleNamespace(scheduler_cls=named, async_scheduling=is_async)
    config = SimpleNamespace(scheduler_config=scheduling)
    assert vllm_turns.with_scheduler(config, Namespace(takes_turns=takes), preemption=True) is config
    assert scheduling.scheduler_cls == expected


def test_without_preemption_the_scheduler_is_that_of_vllm() -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=True))
    vllm_turns.with_scheduler(config, Namespace(takes_turns=True), preemption=False)
    assert config.scheduler_config.scheduler_cls is None
