"""Fair turns in vLLM's queue: it is ordered by `runtime.turns` where vLLM's flags ask for first come, first served.

vLLM orders by priority if its policy is "priority", lower ones first and equal ones by their time, and so its policy is
set to that. Priorities that requests name count only for who chose the policy: with `--scheduling-policy priority` they
are the order, and there are no turns.
"""

from __future__ import annotations

from typing import Any

from sparse_serve.runtime import turns


def set_policy(args: Any) -> None:
    """Have requests take turns where vLLM's flags, `args`, say nothing of their order."""
    args.takes_turns = args.scheduling_policy == "fcfs"
    args.scheduling_policy = "priority"


def install(client: Any, args: Any) -> None:
    """Every request to `client`, an `AsyncLLM`, gets the priority of its turn, if they take turns."""
    if not args.takes_turns:
        return
    add_request = client.add_request

    async def in_turn(request_id: str, prompt: Any, params: Any, *rest: Any, priority: int = 0, **more: Any) -> Any:
        place = turns.place(getattr(params, "n", 1))
        return await add_request(request_id, prompt, params, *rest, priority=place, **more)

    client.add_request = in_turn
