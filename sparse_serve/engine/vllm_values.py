"""Converts sampling parameters to vLLM's, and vLLM's outputs to `Chunk` and `EngineInfo`, without importing vLLM."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparse_serve.engine import (
    DEFAULT_MAX_TOKENS,
    Chunk,
    EngineInfo,
    FinishReason,
    KernelChoice,
    PositionLogprobs,
    Sampling,
    TokenLogprob,
)

logger = logging.getLogger(__name__)

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_SEED_IN_PLACE_OF_MINUS_1 = -0x5EED_5EED_5EED
"""vLLM takes a seed of -1 for "random", and here it is a seed like any other."""

_REASONS = {
    "stop": FinishReason.STOP,
    "repetition": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "error": FinishReason.ERROR,
}


def sampling_arguments(sampling: Sampling, model_defaults: Mapping[str, Any], max_model_len: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`.

    `model_defaults` come from the model's generation_config.json, as for the HTTP API. `max_tokens` is cut to
    `max_model_len`; the scheduler ends a request that reaches it together with its prompt.
    """
    arguments = {name: value for name, value in model_defaults.items() if name in _SAME_NAME}
    for name in _SAME_NAME:
        value = getattr(sampling, name)
        if value is not None:
            arguments[name] = value
    max_tokens = sampling.max_tokens or model_defaults.get("max_tokens") or DEFAULT_MAX_TOKENS
    return arguments | {
        "max_tokens": min(max_tokens, max_model_len),
        "seed": _SEED_IN_PLACE_OF_MINUS_1 if sampling.seed == -1 else sampling.seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
    }


def to_chunk(output: Any, completion_tokens: int, sampling: Sampling) -> Chunk:
    """One of vLLM's `RequestOutput`s (of kind DELTA) as a `Chunk`."""
    completion = output.outputs[0]
    token_ids = tuple(completion.token_ids)
    prompt_ids = output.prompt_token_ids or ()
    return Chunk(
        text=completion.text,
        token_ids=token_ids,
        prompt_tokens=len(prompt_ids),
        completion_tokens=completion_tokens,
        finish_reason=None if completion.finish_reason is None else _REASONS[completion.finish_reason],
        logprobs=_positions(token_ids, completion.logprobs, sampling.logprobs),
        prompt_logprobs=_positions(prompt_ids[1:], (output.prompt_logprobs or ())[1:], sampling.prompt_logprobs),
    )


def engine_info(name: str, model: Any, ranks: Sequence[Mapping[str, Any]], tensor_parallel: int) -> EngineInfo:
    """From vLLM's model config and the `sparse_stats` of all workers.

    Tensor-parallel ranks hold parts of the same layers, pipeline-parallel ranks hold different ones.
    """
    stages = ranks[::tensor_parallel]
    kernels: Counter[str] = Counter()
    for stage in stages:
        kernels.update(stage["kernels"])
    return EngineInfo(
        model=name,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        dtype=str(model.dtype).removeprefix("torch."),
        sparse_layers=sum(stage["sparse_layers"] for stage in stages),
        dense_layers=sum(stage["dense_layers"] for stage in stages),
        kernels=dict(kernels),
        choices=_slowest(KernelChoice(**choice) for rank in ranks for choice in rank["choices"]),
        sparse_weight_bytes=sum(rank["sparse_weight_bytes"] for rank in ranks),
        dense_equivalent_bytes=sum(rank["dense_equivalent_bytes"] for rank in ranks),
    )


def takes_chat(template: str | None, tokenizer: Any) -> bool:
    """Whether chat requests can be answered: there is a template, from a flag or beside the model's tokenizer."""
    return bool(template or getattr(tokenizer, "chat_template", None))


def _slowest(choices: Iterable[KernelChoice]) -> tuple[KernelChoice, ...]:
    """Every rank measures for itself, and a step waits for the last one: of equal choices the least speedup."""
    kinds: dict[KernelChoice, KernelChoice] = {}
    for choice in choices:
        kind = replace(choice, speedup=0.0)
        kinds[kind] = min(choice, kinds.get(kind, choice), key=lambda one: one.speedup)
    return tuple(kinds.values())


def _positions(token_ids: Any, tables: Any, top: int | None) -> tuple[PositionLogprobs, ...]:
    """`tables` has, per position, vLLM's dict of token id -> Logprob; it may be absent."""
    if top is None or not tables:
        return ()
    return tuple(
        PositionLogprobs(
            TokenLogprob(token_id, table[token_id].logprob),
            tuple(
                TokenLogprob(id_, entry.logprob)
                for id_, entry in sorted(table.items(), key=lambda item: item[1].rank)[:top]
            ),
        )
        for token_id, table in zip(token_ids, tables, strict=True)
    )
