"""Fair turns in vLLM's queue: it is ordered by `runtime.turns` where vLLM's flags say nothing of an order.

vLLM orders by priority if its policy is "priority", lower ones first and equal ones by their time, and so its policy is
set to that. Whoever gives `--scheduling-policy` has what vLLM makes of it, and no turns.
"""

from __future__ import annotations

from typing import Any

from sparse_serve.runtime import turns


def set_policy(args: Any) -> None:
    """Have requests take turns where vLLM's flags, `args`, name no policy (None)."""
    args.takes_turns = args.scheduling_policy is None
    if args.takes_turns:
        args.scheduling_policy = "priority"


def install(client: Any, args: Any) -> None:
    """Every request to `client`, an `AsyncLLM`, gets the priority of its turn, if they take turns."""
    if not args.takes_turns:
        return
    add_request = client.add_request

    async def in_turn(request_id: str, prompt: Any, params: Any, *rest: Any, priority: int = 0, **more: Any) -> Any:
        due = turns.due(getattr(params, "n", 1))
        return await add_request(request_id, prompt, params, *rest, priority=due, **more)

    client.add_request = in_turn
