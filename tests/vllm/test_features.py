"""Features of vLLM that change how tokens come about, and must not change which: sparse layers against transformers.

Adapters are in `test_lora`, tensor parallelism in `test_parallel`, structured output in `test_services`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.offline import NEW_TOKENS, PROMPTS, greedy, make_sparse, serve, transformers_oracle


def again(llm: Any) -> tuple[list[list[int]], list[int]]:
    """Greedy continuations of the prompts, said several times; and how many tokens of each came from the cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS - 1, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids * (48 // len(ids))} for ids in PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], [output.num_cached_tokens for output in outputs]


def test_a_cached_prefix_gives_the_same_tokens(tmp_path: Path) -> None:
    sparse, _ = make_sparse("llama", tmp_path)
    with serve(sparse, enable_prefix_caching=True, block_size=32) as llm:
        first, none = again(llm)
        second, cached = again(llm)
    assert first == second
    assert not any(none) and cached == [32] * len(PROMPTS), "of 48 tokens, one whole block"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_batched_tokens": 4, "max_num_seqs": 2, "enable_chunked_prefill": True}, id="in chunks"),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}},
            id="with guesses from the prompt",
        ),
    ],
)
def test_prompts_give_the_tokens_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    sparse, masked = make_sparse("llama", tmp_path)
    tokens, _ = transformers_oracle(masked)
    with serve(sparse, **options) as llm:
        assert greedy(llm) == tokens
