"""vLLM's queue in the order of turns, unless its flags name an order."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_serve.engine import vllm_turns
from sparse_serve.runtime import turns


@pytest.mark.parametrize(
    ("policy", "expected"), [(None, [4, 8, 9]), ("fcfs", [-5, -5, -5]), ("priority", [-5, -5, -5])]
)
async def test_the_priority_is_the_turn_where_requests_take_turns(policy: str | None, expected: list[int]) -> None:
    found = []

    async def add_request(request_id: str, prompt: Any, params: Any, *, priority: int = 0) -> str:
        found.append(priority)
        return request_id

    args, client = Namespace(scheduling_policy=policy), SimpleNamespace(add_request=add_request)
    vllm_turns.set_policy(args)
    assert args.scheduling_policy == (policy or "priority")
    vllm_turns.install(client, args)
    turns.enter(3, 9)
    for params in (SimpleNamespace(n=1), SimpleNamespace(n=4), SimpleNamespace()):
        assert await client.add_request("id", "prompt", params, priority=-5) == "id"
    assert found == expected
