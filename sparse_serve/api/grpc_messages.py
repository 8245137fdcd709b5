"""Converts gRPC messages to engine types and back, and checks the limits of requests.

A request is checked here before the engine sees it: everything that has a number or a length has a limit, and the
error names the field. Numbers that are merely odd (a penalty of 90) are the model's business; NaN is not a number.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version
from typing import Any

from pydantic_core import from_json

from maskgen.core.quality import Quality
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.engine import (
    Chunk,
    Constraint,
    ConstraintKind,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    PositionLogprobs,
    Sampling,
)
from sparse_serve.runtime.errors import BadRequestError, UnknownModelError
from sparse_serve.server.body_limits import MAX_LOGIT_BIAS, body_limits
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
_CONSTRAINTS = {
    "json_schema": ConstraintKind.JSON,
    "regex": ConstraintKind.REGEX,
    "grammar": ConstraintKind.GRAMMAR,
}
_INT32_MAX = 2**31 - 1


def read_request(
    message: pb.GenerateRequest | pb.GenerateStreamRequest, info: EngineInfo, models: Sequence[str], settings: Settings
) -> GenerateRequest:
    """Check a request and convert it. `models` are the names that it may ask for.

    Raises `BadRequestError`, or `UnknownModelError` if it names another model.
    """
    check_model(message.model, models)
    sampling = read_sampling(message.sampling, info, settings)
    return GenerateRequest(_prompt(message, info), sampling, message.model, message.priority)


def check_model(name: str, models: Sequence[str]) -> None:
    """Raise `UnknownModelError` for a name that is not empty and not one of `models`."""
    if name and name not in models:
        known = ", ".join(map(repr, models))
        raise UnknownModelError(f"model {name!r} is not served here; expected one of: {known}")


def _prompt(message: pb.GenerateRequest | pb.GenerateStreamRequest, info: EngineInfo) -> str | tuple[int, ...]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise BadRequestError("prompt: give text or token_ids", "prompt")
    if kind == "text":
        if not message.text:
            raise BadRequestError("text is empty; give at least one character", "text")
        return message.text
    ids = tuple(message.token_ids.ids)
    if not 1 <= len(ids) < info.max_model_len:
        raise BadRequestError(f"token_ids: {len(ids)} tokens; expected 1 to {info.max_model_len - 1}", "token_ids")
    check_ids("token_ids", ids, info)
    return ids


def read_sampling(message: pb.Sampling, info: EngineInfo, settings: Settings) -> Sampling:
    """Check a request's `Sampling` and convert it. Raises `BadRequestError`."""
    for name, (low, high) in _FLOAT_BOUNDS.items():
        value = getattr(message, name)
        if message.HasField(name) and (math.isnan(value) or not low <= value <= high):
            raise BadRequestError(f"{name} is {value}; expected a number from {low:g} to {high:g}", name)
    _check_count("max_tokens", message, 1, _INT32_MAX)
    _check_count("top_k", message, 0, _INT32_MAX)
    _check_count("logprobs", message, 0, settings.max_logprobs)
    _check_count("prompt_logprobs", message, 0, settings.max_logprobs)
    _check_count("n", message, 1, settings.max_sequences)
    _check_count("min_tokens", message, 0, _INT32_MAX)
    _check_stops(message, info, settings)
    _check_bias(message, info)
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
        n=_given(message, "n") or 1,
        logit_bias=dict(message.logit_bias) or None,
        min_tokens=_given(message, "min_tokens") or 0,
        constraint=_constraint(message.constraint, settings) if message.HasField("constraint") else None,
    )


def _constraint(message: pb.Constraint, settings: Settings) -> Constraint:
    kind = message.WhichOneof("kind")
    if kind is None or (kind == "json_object" and not message.json_object):
        raise BadRequestError("constraint: give one of json_schema, json_object, regex, choice, grammar", "constraint")
    if kind == "json_object":
        return Constraint(ConstraintKind.JSON_OBJECT)
    given, where, limits = getattr(message, kind), f"constraint.{kind}", body_limits(settings)
    if kind == "choice":
        texts = tuple(given.texts)
        limits.check_choice(where, texts)
        if not texts or not all(texts):
            raise BadRequestError(f"{where}: expected one text or more, none of them empty", where)
        return Constraint(ConstraintKind.CHOICE, texts)
    limits.check_grammar(where, kind, given)
    if not given:
        raise BadRequestError(f"{where} is empty", where)
    if kind == "json_schema":
        check_json(where, given)
    return Constraint(_CONSTRAINTS[kind], (given,))


def check_json(where: str, text: str) -> Any:
    """The object that is written in `text` as JSON. Raises `BadRequestError`."""
    try:
        value = from_json(text)
    except ValueError as error:
        raise BadRequestError(f"{where} is no JSON: {error}", where) from None
    if not isinstance(value, dict):
        raise BadRequestError(f"{where} is {type(value).__name__} in JSON; expected an object", where)
    return value


def _check_bias(message: pb.Sampling, info: EngineInfo) -> None:
    if len(message.logit_bias) > MAX_LOGIT_BIAS:
        count = len(message.logit_bias)
        raise BadRequestError(f"logit_bias has {count} entries; expected at most {MAX_LOGIT_BIAS}", "logit_bias")
    check_ids("logit_bias", message.logit_bias, info)
    for value in message.logit_bias.values():
        if not -100 <= value <= 100:  # NaN, too
            raise BadRequestError(f"logit_bias has {value}; expected numbers from -100 to 100", "logit_bias")


def _given(message: pb.Sampling, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _check_count(name: str, message: pb.Sampling, low: int, high: int) -> None:
    value = _given(message, name)
    if value is not None and not low <= value <= high:
        raise BadRequestError(f"{name} is {value}; expected {low} to {high}", name)


def _check_stops(message: pb.Sampling, info: EngineInfo, settings: Settings) -> None:
    for name, count in (("stop", len(message.stop)), ("stop_token_ids", len(message.stop_token_ids))):
        if count > settings.max_stop:
            raise BadRequestError(f"{name} has {count} entries; expected at most {settings.max_stop}", name)
    for text in message.stop:
        if not 1 <= len(text.encode()) <= settings.max_stop_bytes:
            raise BadRequestError(
                f"stop has a string of {len(text.encode())} bytes; expected 1 to {settings.max_stop_bytes}", "stop"
            )
    check_ids("stop_token_ids", message.stop_token_ids, info)


def check_ids(name: str, ids: Iterable[int], info: EngineInfo) -> None:
    """Raise `BadRequestError` for a token id that is none."""
    for id_ in ids:
        if id_ >= info.vocab_size:
            raise BadRequestError(
                f"{name} has {id_}; expected ids below the vocabulary's size, {info.vocab_size}", name
            )


def stream_response(chunk: Chunk) -> pb.GenerateStreamResponse:
    """One chunk as a message. There is one for nearly every token, so it is filled in place, without what is empty."""
    message = pb.GenerateStreamResponse(text=chunk.text, token_ids=chunk.token_ids)
    _fill_usage(message.usage, chunk)
    if chunk.index:
        message.index = chunk.index
    if chunk.finish_reason is not None:
        message.finish_reason = _REASONS[chunk.finish_reason]
    if chunk.logprobs:
        message.logprobs.extend(map(_position, chunk.logprobs))
    if chunk.prompt_logprobs:
        message.prompt_logprobs.extend(map(_position, chunk.prompt_logprobs))
    return message


def whole_response(chunks: Sequence[Chunk], n: int) -> pb.GenerateResponse:
    """All chunks of a finished request for `n` sequences as one message."""
    sequences = [_sequence([chunk for chunk in chunks if chunk.index == index]) for index in range(n)]
    first = sequences[0]
    response = pb.GenerateResponse(
        text=first.text,
        token_ids=first.token_ids,
        finish_reason=first.finish_reason,
        logprobs=first.logprobs,
        prompt_logprobs=[_position(entry) for chunk in chunks for entry in chunk.prompt_logprobs],
        sequences=sequences if n > 1 else (),
    )
    _fill_usage(response.usage, chunks[-1])
    return response


def _sequence(chunks: Sequence[Chunk]) -> pb.Sequence:
    return pb.Sequence(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[id_ for chunk in chunks for id_ in chunk.token_ids],
        finish_reason=_REASONS[chunks[-1].finish_reason] if chunks else pb.FINISH_REASON_ABORT,
        logprobs=[_position(entry) for chunk in chunks for entry in chunk.logprobs],
    )


def model_list(names: Sequence[str], adapters: Collection[str]) -> pb.ListModelsResponse:
    """What requests may ask for, as a message."""
    return pb.ListModelsResponse(models=[pb.Model(name=name, is_adapter=name in adapters) for name in names])


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
        pattern=info.pattern,
        values=info.values,
        mask_digest=info.mask_digest,
        recipe_digest=info.recipe_digest,
        base_digest=info.base_digest,
        server_version=version("sparse-serve"),
        embeds=info.embeds,
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


def _fill_usage(usage: pb.Usage, chunk: Chunk) -> None:
    usage.prompt_tokens = chunk.prompt_tokens
    usage.completion_tokens = chunk.completion_tokens
    usage.first_token_s = chunk.first_token_s
    usage.elapsed_s = chunk.elapsed_s
    if chunk.cached_prompt_tokens:
        usage.cached_prompt_tokens = chunk.cached_prompt_tokens


def _position(entry: PositionLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        token=pb.TokenLogprob(token_id=entry.token.token_id, logprob=entry.token.logprob),
        top=[pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob) for token in entry.top],
    )
