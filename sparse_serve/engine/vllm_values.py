"""Converts sampling parameters to vLLM's, and vLLM's outputs to `Chunk` and `EngineInfo`, without importing vLLM."""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.settings import changed_companions
from sparse_serve.engine import (
    DEFAULT_MAX_TOKENS,
    Chunk,
    Constraint,
    ConstraintKind,
    EngineInfo,
    FinishReason,
    KernelChoice,
    PositionLogprobs,
    Sampling,
    TokenLogprob,
)
from sparse_serve.runtime.errors import EngineStartError

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
        "seed": engine_seed(sampling.seed),
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "n": sampling.n,
        "logit_bias": None if not sampling.logit_bias else dict(sampling.logit_bias),
        "min_tokens": sampling.min_tokens,
    }


def engine_seed(seed: int | None) -> int | None:
    """The seed that makes vLLM do what `Sampling.seed` asks for."""
    return _SEED_IN_PLACE_OF_MINUS_1 if seed == -1 else seed


def constraint_arguments(constraint: Constraint) -> dict[str, Any]:
    """Arguments of vLLM's `StructuredOutputsParams`."""
    if constraint.kind is ConstraintKind.CHOICE:
        return {constraint.kind.value: list(constraint.texts)}
    if constraint.kind is ConstraintKind.JSON_OBJECT:
        return {constraint.kind.value: True}
    (text,) = constraint.texts
    return {constraint.kind.value: text}


@dataclass
class Outputs:
    """What vLLM puts out for one request, of kind DELTA, as chunks; with counts and times from `started_s` on."""

    sampling: Sampling
    started_s: float = field(default_factory=time.monotonic)
    completion_tokens: int = 0
    first_token_s: float = 0.0
    told_prompt: bool = False

    def chunks(self, output: Any) -> Iterator[Chunk]:
        """Of one `RequestOutput`: a chunk for every sequence that it has something of."""
        prompt_ids = output.prompt_token_ids or ()  # many, so nothing goes through them for each token
        # every sequence has them, and they are the same
        prompt_logprobs = () if self.told_prompt or not output.prompt_logprobs else output.prompt_logprobs[1:]
        elapsed_s = time.monotonic() - self.started_s
        for completion in output.outputs:
            token_ids = tuple(completion.token_ids)
            self.completion_tokens += len(token_ids)
            self.first_token_s = self.first_token_s or elapsed_s
            yield Chunk(
                text=completion.text,
                token_ids=token_ids,
                prompt_tokens=len(prompt_ids),
                completion_tokens=self.completion_tokens,
                finish_reason=None if completion.finish_reason is None else _REASONS[completion.finish_reason],
                logprobs=_positions(token_ids, completion.logprobs, self.sampling.logprobs),
                prompt_logprobs=prompt_logprobs
                and _positions(prompt_ids[1:], prompt_logprobs, self.sampling.prompt_logprobs),
                index=completion.index,
                cached_prompt_tokens=output.num_cached_tokens or 0,
                first_token_s=self.first_token_s,
                elapsed_s=elapsed_s,
            )
            self.told_prompt |= bool(prompt_logprobs)
            prompt_logprobs = ()


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


def with_manifest(info: EngineInfo, checkpoint: SparseCheckpoint, served: Collection[str]) -> EngineInfo:
    """`info` with what the checkpoint says of itself; `EngineStartError` unless every target of its manifest is among
    the layers `served` sparse."""
    config = checkpoint.config
    if missing := sorted(set(config.targets) - set(served)):
        raise EngineStartError(
            f"{len(missing)} of {len(config.targets)} layers of {checkpoint.path} are not served sparse: "
            f"{', '.join(missing[:5])}; is the plugin installed, and does VLLM_PLUGINS leave it in?"
        )
    return replace(
        info,
        pattern=str(config.pattern),
        values=config.values,
        mask_digest=config.mask_digest,
        recipe_digest=config.recipe_digest,
        base_digest=config.base_digest,
        changes=changed_companions(checkpoint.path),
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
