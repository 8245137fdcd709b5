"""Converts gRPC messages to engine types and back, and checks the limits of requests.

A request is checked here before the engine sees it: everything that has a number or a length has a limit, and the
error names the field. Numbers that are merely odd (a penalty of 90) are the model's business; NaN is not a number.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from maskgen.core.quality import Quality
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine import (
    Chunk,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    PositionLogprobs,
    Sampling,
)
from sparse_serve.runtime.errors import BadRequestError, UnknownModelError
from sparse_serve.server.settings import Settings

_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FLOAT_BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-9, 1e4),
}
_INT32_MAX = 2**31 - 1


def read_request(
    message: pb.GenerateRequest | pb.GenerateStreamRequest, info: EngineInfo, models: Sequence[str], settings: Settings
) -> GenerateRequest:
    """Check a request and convert it. `models` are the names that it may ask for.

    Raises `BadRequestError`, or `UnknownModelError` if it names another model.
    """
    if message.model and message.model not in models:
        known = ", ".join(map(repr, models))
        raise UnknownModelError(f"model {message.model!r} is not served here; expected one of: {known}")
    return GenerateRequest(_prompt(message, info), _sampling(message.sampling, info, settings), message.model)


def _prompt(message: pb.GenerateRequest | pb.GenerateStreamRequest, info: EngineInfo) -> str | tuple[int, ...]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise BadRequestError("prompt: give text or token_ids")
    if kind == "text":
        if not message.text:
            raise BadRequestError("text is empty; give at least one character")
        return message.text
    ids = tuple(message.token_ids.ids)
    if not 1 <= len(ids) < info.max_model_len:
        raise BadRequestError(f"token_ids: {len(ids)} tokens; expected 1 to {info.max_model_len - 1}")
    _check_ids("token_ids", ids, info)
    return ids


def _sampling(message: pb.Sampling, info: EngineInfo, settings: Settings) -> Sampling:
    for name, (low, high) in _FLOAT_BOUNDS.items():
        value = getattr(message, name)
        if message.HasField(name) and (math.isnan(value) or not low <= value <= high):
            raise BadRequestError(f"{name} is {value}; expected a number from {low:g} to {high:g}")
    _check_count("max_tokens", message, 1, _INT32_MAX)
    _check_count("top_k", message, 0, _INT32_MAX)
    _check_count("logprobs", message, 0, settings.max_logprobs)
    _check_count("prompt_logprobs", message, 0, settings.max_logprobs)
    _check_stops(message, info, settings)
    return Sampling(
        max_tokens=_given(message, "max_tokens"),
        temperature=_given(message, "temperature"),
        top_p=_given(message, "top_p"),
        top_k=_given(message, "top_k"),
        min_p=_given(message, "min_p"),
        seed=_given(message, "seed"),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        presence_penalty=_given(message, "presence_penalty"),
        frequency_penalty=_given(message, "frequency_penalty"),
        repetition_penalty=_given(message, "repetition_penalty"),
        logprobs=_given(message, "logprobs"),
        prompt_logprobs=_given(message, "prompt_logprobs"),
    )


def _given(message: pb.Sampling, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _check_count(name: str, message: pb.Sampling, low: int, high: int) -> None:
    value = _given(message, name)
    if value is not None and not low <= value <= high:
        raise BadRequestError(f"{name} is {value}; expected {low} to {high}")


def _check_stops(message: pb.Sampling, info: EngineInfo, settings: Settings) -> None:
    for name, count in (("stop", len(message.stop)), ("stop_token_ids", len(message.stop_token_ids))):
        if count > settings.max_stop:
            raise BadRequestError(f"{name} has {count} entries; expected at most {settings.max_stop}")
    for text in message.stop:
        if not 1 <= len(text.encode()) <= settings.max_stop_bytes:
            raise BadRequestError(
                f"stop has a string of {len(text.encode())} bytes; expected 1 to {settings.max_stop_bytes}"
            )
    _check_ids("stop_token_ids", message.stop_token_ids, info)


def _check_ids(name: str, ids: Iterable[int], info: EngineInfo) -> None:
    for id_ in ids:
        if id_ >= info.vocab_size:
            raise BadRequestError(f"{name} has {id_}; expected ids below the vocabulary's size, {info.vocab_size}")


def stream_response(chunk: Chunk) -> pb.GenerateStreamResponse:
    """One chunk as a message."""
    return pb.GenerateStreamResponse(
        text=chunk.text,
        token_ids=chunk.token_ids,
        finish_reason=_REASONS[chunk.finish_reason],
        usage=_usage(chunk),
        logprobs=map(_position, chunk.logprobs),
        prompt_logprobs=map(_position, chunk.prompt_logprobs),
    )


def whole_response(chunks: list[Chunk]) -> pb.GenerateResponse:
    """All chunks of a finished request as one message."""
    return pb.GenerateResponse(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[id_ for chunk in chunks for id_ in chunk.token_ids],
        finish_reason=_REASONS[chunks[-1].finish_reason],
        usage=_usage(chunks[-1]),
        logprobs=[_position(entry) for chunk in chunks for entry in chunk.logprobs],
        prompt_logprobs=[_position(entry) for chunk in chunks for entry in chunk.prompt_logprobs],
    )


def model_info(info: EngineInfo, models: Sequence[str]) -> pb.GetModelInfoResponse:
    """What is served, under these names, as a message."""
    return pb.GetModelInfoResponse(
        model=info.model,
        models=models,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        dtype=info.dtype,
        sparse_layers=info.sparse_layers,
        dense_layers=info.dense_layers,
        kernels=info.kernels,
        sparse_weight_bytes=info.sparse_weight_bytes,
        dense_equivalent_bytes=info.dense_equivalent_bytes,
        quality=None if info.quality is None else _quality(info.quality),
    )


def _quality(quality: Quality) -> pb.Quality:
    return pb.Quality(
        dense_perplexity=quality.dense_perplexity,
        perplexity=quality.perplexity,
        kl_divergence=quality.kl,
        top1_agreement=quality.agreement,
        windows=quality.windows,
        window_tokens=quality.window_tokens,
        texts=quality.texts,
        bad=quality.is_bad,
        advice=quality.advice(),
    )


def _usage(chunk: Chunk) -> pb.Usage:
    return pb.Usage(prompt_tokens=chunk.prompt_tokens, completion_tokens=chunk.completion_tokens)


def _position(entry: PositionLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        token=pb.TokenLogprob(token_id=entry.token.token_id, logprob=entry.token.logprob),
        top=[pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob) for token in entry.top],
    )
