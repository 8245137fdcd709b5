"""vLLM's scheduler, with turns for those that run too: who is due takes the place of one whose turn is later.

vLLM's queue is in the order of priorities (`engine.vllm_turns`), but a request that runs keeps its place until it ends,
and 256 sequences of two clients then keep everybody else waiting for as long as they take. Here the sequences that are
due last are put aside, as vLLM does when its cache is full: they go back into the queue and go on later, from what the
prefix cache still has of them. Each is put aside `_MOST` times at most, which bounds what is computed twice.
"""

from __future__ import annotations

import heapq
import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

_MOST = 3
_READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class TurnScheduler(Scheduler):
    """With the policy "priority"."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step of the engine."""
        make_room(self)
        return super().schedule(*args, **kwargs)


class AsyncTurnScheduler(AsyncScheduler):
    """The same, where vLLM schedules a step while the one before it runs."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step of the engine."""
        make_room(self)
        return super().schedule(*args, **kwargs)


def make_room(scheduler: Scheduler) -> None:
    """Put running requests aside for waiting ones that are due before them, if all places are taken."""
    taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
    if taken < scheduler.max_num_active_reqs or not scheduler.waiting:
        return
    can_yield = [request for request in scheduler.running if _can_yield(scheduler, request)]
    if not can_yield:
        return
    last = max(request.priority for request in can_yield)
    due = sorted(other.priority for other in scheduler.waiting if other.priority < last and other.status in _READY)
    victims = heapq.nlargest(len(due), can_yield, key=lambda request: (request.priority, request.arrival_time))
    now_s = time.monotonic()
    for priority, victim in zip(due, victims, strict=False):
        if priority >= victim.priority:
            return
        scheduler.running.remove(victim)
        scheduler._preempt_request(victim, now_s, drop_stale_output=scheduler.requires_kv_delivery)
        scheduler.prev_step_scheduled_req_ids.discard(victim.request_id)


def _can_yield(scheduler: Scheduler, request: Request) -> bool:
    """Whether a running request loses nothing but its place: its prompt is read, and none of that was asked for."""
    params = request.sampling_params
    return (
        request.num_preemptions < _MOST
        and not request.is_prefill_chunk
        and params is not None
        and params.prompt_logprobs is None
        and scheduler._request_blocks_can_be_freed(request)
    )
