"""Fair turns in vLLM: its queue is ordered by `runtime.turns` where vLLM's flags say nothing of an order.

vLLM orders by priority if its policy is "priority", lower ones first and equal ones by their time, and so its policy is
set to that; `plugin.scheduler` applies the order to those that run as well, unless `--scheduler-cls` names another or
`--no-preemption` is given. Whoever gives `--scheduling-policy` has what vLLM makes of it, and no turns.
"""

from __future__ import annotations

import functools
from typing import Any

from sparse_serve.runtime import turns


def set_policy(args: Any) -> None:
    """Have requests take turns where vLLM's flags, `args`, name no policy (None)."""
    args.takes_turns = args.scheduling_policy is None
    if args.takes_turns:
        args.scheduling_policy = "priority"


def with_scheduler(config: Any, args: Any, preemption: bool) -> Any:
    """vLLM's configuration, with the scheduler that turns need, if those that run take some too (`preemption`)."""
    scheduling = config.scheduler_config
    if preemption and args.takes_turns and scheduling.scheduler_cls is None:
        kind = "AsyncTurnScheduler" if scheduling.async_scheduling else "TurnScheduler"
        scheduling.scheduler_cls = f"sparse_serve.plugin.scheduler.{kind}"
    return config


def install(client: Any, args: Any) -> None:
    """Every request to `client`, an `AsyncLLM`, gets the priority of its turn, if they take turns."""
    if not args.takes_turns:
        return
    add_request = client.add_request

    async def in_turn(request_id: str, prompt: Any, params: Any, *rest: Any, priority: int = 0, **more: Any) -> Any:
        due = turns.due(getattr(params, "n", 1))
        queue = await add_request(request_id, prompt, params, *rest, priority=due, **more)
        if (request := turns.current()) is not None:
            request.watch(functools.partial(_has_begun, _sequences(client.output_processor, queue.request_id)))
        return queue

    client.add_request = in_turn


def _sequences(processor: Any, id_: str) -> list[Any]:
    """vLLM's states of a request's sequences that have not ended."""
    parent = processor.parent_requests.get(id_)
    names = [id_] if parent is None else parent.child_requests
    return [processor.request_states[name] for name in names if name in processor.request_states]


def _has_begun(sequences: list[Any]) -> bool:
    """Whether the engine has given a token of one, or there are none left of it."""
    return not sequences or not all(sequence.is_prefilling for sequence in sequences)
