"""vLLM's schedulers without an engine, with a model whose next token says at which place in the sequence it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import models
from tests.vllm.serving import SHAPE

BLOCK = 32
PLACES = 4


def token_at(place: int) -> int:
    return 10 + place % 80


class Driver:
    """A scheduler, and a model whose answer to a step comes `steps_ahead` steps after it was scheduled."""

    def __init__(self, scheduler: Any, steps_ahead: int = 0) -> None:
        self.scheduler, self.steps_ahead = scheduler, steps_ahead
        self.preempted: list[str] = []
        self.events: list[str] = []
        self.prompts: dict[str, int] = {}
        self.requests: dict[str, Any] = {}
        self._under_way: deque[tuple[Any, dict[str, int]]] = deque()
        self._preempt: Callable[..., None] = scheduler._preempt_request
        scheduler._preempt_request = self._note

    def _note(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.preempted.append(request.request_id)
        self._preempt(request, *args, **kwargs)
        self.events.append(request.events[-1].type.name)

    def add(
        self, name: str, priority: int, count: int, prompt: list[int] | int = 3, adapter: int = 0, **params: Any
    ) -> Any:
        """A request for `count` tokens, due at `priority`. `prompt`: its tokens, or how many, of one like no other."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        ids = [100 + len(self.requests), *range(prompt - 1)] if isinstance(prompt, int) else prompt
        request = self.requests[name] = Request(
            name,
            ids,
            SamplingParams(max_tokens=count, ignore_eos=True, **params),
            None,
            arrival_time=len(self.requests),
            priority=priority,
            lora_request=LoRARequest(str(adapter), adapter, "/nowhere") if adapter else None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.prompts[name] = len(ids)
        self.scheduler.add_request(request)
        return request

    def step(self, **given: Any) -> set[str]:
        """Schedule one step, and answer the one of `steps_ahead` before. Returns who is in the new one."""
        planned = self.scheduler.schedule(**given)
        self._under_way.append((planned, self._places(planned)))
        if len(self._under_way) > self.steps_ahead:
            self._answer(*self._under_way.popleft())
        return set(planned.num_scheduled_tokens)

    def _places(self, planned: Any) -> dict[str, int]:
        """Of those that get a token in a step, its place in the sequence."""
        cached = planned.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {new.req_id: new.num_computed_tokens for new in planned.scheduled_new_reqs}
        counts = planned.num_scheduled_tokens.items()
        return {
            name: before[name] + count for name, count in counts if not self.scheduler.requests[name].is_prefill_chunk
        }

    def _answer(self, planned: Any, places: dict[str, int]) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(planned.num_scheduled_tokens)
        made = [[token_at(places[name])] if name in places else [] for name in names]
        index = {name: number for number, name in enumerate(names)}
        self.scheduler.update_from_output(
            planned, ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=made)
        )

    def run(self, most: int = 2000) -> int:
        """Until nobody is left; returns the number of steps. Everybody has to have the tokens of their places then."""
        for steps in range(most):
            if not self.scheduler.requests and not self._under_way:
                self.check()
                return steps
            self.step()
            if not self.scheduler.requests:
                while self._under_way:
                    self._answer(*self._under_way.popleft())
        raise AssertionError(f"still there: {list(self.scheduler.requests)}")

    def check(self) -> None:
        for name, request in self.requests.items():
            start = self.prompts[name]
            assert list(request.output_token_ids) == [token_at(start + number) for number in range(request.max_tokens)]


def configuration(folder: Path, **flags: Any) -> Any:
    """vLLM's, for `PLACES` sequences in the order of turns."""
    from vllm.engine.arg_utils import EngineArgs

    models.save("llama", folder, **SHAPE)
    given = {"max_num_seqs": PLACES, "scheduling_policy": "priority", "enforce_eager": True, "block_size": BLOCK}
    return EngineArgs(model=str(folder), **{**given, **flags}).create_engine_config()


def driver(config: Any, kind: str = "TurnScheduler", blocks: int = 100, steps_ahead: int | None = None) -> Driver:
    """`kind`: a scheduler of ours, or the name of vLLM's own."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from sparse_serve.plugin import scheduler as ours

    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["a"], spec)])
    made = getattr(ours, kind, Scheduler)(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )
    return Driver(made, (kind == "AsyncTurnScheduler") if steps_ahead is None else steps_ahead)


def step_and_check(of: Driver) -> None:
    """Who is preempted in a step goes for one that is due before, and in this step (or because the cache is full)."""
    waiting = {other.request_id for other in of.scheduler.waiting}
    before = len(of.preempted)
    made: list[str] = []
    _turns = of.scheduler._turns
    make_room = _turns.make_room
    _turns.make_room = lambda: (make_room(), made.extend(of.preempted[before:]))[0]
    inside = of.step()
    _turns.make_room = make_room
    for name in made:
        came = [other for other in inside & waiting if of.requests[other].priority < of.requests[name].priority]
        assert came, (name, made, waiting, inside)
    assert not of.scheduler._turns._in_vain, "vLLM takes whom there was room for"
