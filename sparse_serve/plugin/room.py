"""What a step of vLLM's scheduler has left for requests that wait: places, tokens, cache blocks and adapters.

Counted as `Scheduler.schedule` of vLLM 0.32 counts, but never more than that: who has room here has it there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class Room:
    """Before a step of `scheduler`, once those that run have had what they need in it.

    Victims' tokens are not counted: a step reads a prompt in what one that decodes leaves, a token, for no gain.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._cache = scheduler, scheduler.kv_cache_manager
        running = scheduler.running
        config, spec = scheduler.scheduler_config, scheduler.vllm_config.speculative_config
        self._draft_slots = spec.max_num_new_slots_for_drafting if spec is not None else 0
        self._most_tokens = self._most_tokens_of_one()
        tokens = sum(map(self._step_tokens, running))
        self._tokens = min(
            scheduler.max_num_scheduled_tokens - tokens,
            config.max_num_batched_tokens - tokens - (len(running) + 1) * self._draft_slots,
        )
        self._places = scheduler.max_num_active_reqs - len(running) - scheduler.num_waiting_for_streaming_input
        groups = len(scheduler.kv_cache_config.kv_cache_groups)
        self._reserved = groups * (tokens + len(running) * (scheduler.num_lookahead_tokens + 2))
        free = self._cache.block_pool.get_num_free_blocks() - self._cache.watermark_blocks
        self._blocks = free - self._reserved
        self._adapters = Counter(map(_adapter, running))
        self._hits: set[int] = set()

    def takes_adapter_of(self, request: Request) -> bool:
        """Whether vLLM does not pass over it because too many adapters are in the step already."""
        config = self._scheduler.lora_config
        if config is None or not (adapter := _adapter(request)) or self._adapters[adapter]:
            return True
        return sum(1 for other, count in self._adapters.items() if other and count) < config.max_loras

    def victims_for(self, request: Request, candidates: Iterable[Request]) -> list[Request] | None:
        """Those of `candidates`, the first that it needs, without whom `request` is taken into the step: none if it is
        anyway. None if there is no room for it without all of them either. If there is, it takes it.
        """
        hits, cached, _ = self._cache.get_computed_blocks(request)
        tokens = request.num_tokens - cached
        if self._tokens < (1 if self._scheduler.scheduler_config.enable_chunked_prefill else tokens):
            return None
        needs = self._blocks_of(request, request.num_tokens, cached, hits.blocks)
        shared = self._hits | {block.block_id for group in hits.blocks for block in group}
        if self._blocks < needs:
            self._count_blocks()
        places, blocks, freed = self._places, self._blocks, dict[Request, int]()
        remaining = iter(candidates)
        while places < 1 or blocks < needs:
            if (candidate := next(remaining, None)) is None:
                return None
            count = self._freed(candidate, shared)
            if places < 1 or count:
                places, blocks, freed[candidate] = places + 1, blocks + count, count
        for candidate, count in list(freed.items()):  # who has become needless by a later one
            if places > 1 and blocks - count >= needs:
                places, blocks = places - 1, blocks - count
                del freed[candidate]
        chosen, self._hits = list(freed), shared
        self._places, self._blocks = places - 1, blocks - needs
        self._tokens -= min(tokens, self._most_tokens, self._tokens) + self._draft_slots
        self._adapters -= Counter(map(_adapter, chosen))
        self._adapters[_adapter(request)] += 1
        return chosen

    def _count_blocks(self) -> None:
        """Take what those that run are given in the step for `_reserved`, which is more and costs nothing to know."""
        if self._reserved:
            self._blocks += self._reserved - sum(map(self._step_blocks, self._scheduler.running))
            self._reserved = 0

    def _most_tokens_of_one(self) -> int:
        """Of a prompt in one step (`long_prefill_token_threshold`)."""
        scheduler = self._scheduler
        threshold, most = scheduler.scheduler_config.long_prefill_token_threshold, scheduler.max_num_scheduled_tokens
        if threshold and scheduler.adaptive_long_prefill_threshold:
            threshold = max(
                threshold, scheduler.scheduler_config.max_num_batched_tokens // sum(scheduler.get_request_counts())
            )
        return min(threshold or most, most)

    def _step_tokens(self, request: Request) -> int:
        """What one that runs computes in the step."""
        left = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
        return max(0, min(left, self._most_tokens))

    def _step_blocks(self, request: Request) -> int:
        """What one that runs is given in the step."""
        return self._blocks_of(
            request, request.num_computed_tokens + self._step_tokens(request), request.num_computed_tokens
        )

    def _blocks_of(
        self, request: Request, tokens: int, computed: int, hits: Sequence[Sequence[object]] | None = None
    ) -> int:
        """Blocks that a request lacks for so many tokens, of which `computed` are there: in its own blocks, or if it
        waits, as `hits`."""
        most = self._scheduler.max_model_len
        blocks: int = self._cache.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=min(tokens + self._scheduler.num_lookahead_tokens, most),
            new_computed_blocks=self._cache.empty_kv_cache_blocks.blocks if hits is None else hits,
            num_encoder_tokens=0,
            total_computed_tokens=computed,
            num_local_computed_tokens=computed,
            num_tokens_main_model=min(tokens, most),
            apply_admission_cap=hits is not None,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        return blocks

    def _freed(self, victim: Request, shared: set[int]) -> int:
        """Blocks that nobody else uses, nor those who are taken into the step, and what it would be given in it."""
        groups = self._cache.get_blocks(victim.request_id).blocks
        own = sum(
            block.ref_cnt == 1 and not block.is_null and block.block_id not in shared
            for group in groups
            for block in group
        )
        return own if self._reserved else own + self._step_blocks(victim)


def _adapter(request: Request) -> int:
    """vLLM's number of its LoRA adapter; 0 for the model itself."""
    return request.lora_request.lora_int_id if request.lora_request is not None else 0
