"""One request to a running `AsyncLLM`: generation, conversations, tokens, log-probabilities, a sign of life.

Perplexity: `score` asks for `prompt_logprobs=0`, the log-probability of each actual prompt token. vLLM computes it as
a float32 log-softmax over the whole vocabulary, so it is exact.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from sparse_serve.engine import Chunk, GenerateRequest, Origin
from sparse_serve.engine.vllm_values import Outputs, constraint_arguments, engine_seed, sampling_arguments
from sparse_serve.runtime.errors import (
    BadRequestError,
    EngineDiedError,
    OverloadedError,
    ServeError,
    UnknownModelError,
)
from sparse_serve.runtime.startup_error import reason

_CHARACTERS = 40
"""As vLLM has it for prompts: more of them than this for each token that fits cannot fit, whatever they are."""


async def generate(
    client: Any, request: GenerateRequest, adapter: Callable[[str], Any], defaults: Mapping[str, Any]
) -> AsyncGenerator[Chunk, None]:
    """See `Engine.generate`. `adapter` gives vLLM's object for the model that the request names, `defaults` are what
    the model's own settings say of sampling."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    prompt = request.prompt
    source = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
    sampling, found = request.sampling, Outputs(request.sampling)
    arguments = sampling_arguments(sampling, defaults, client.model_config.max_model_len)
    with _translated():
        if sampling.constraint is not None:
            arguments["structured_outputs"] = StructuredOutputsParams(**constraint_arguments(sampling.constraint))
        params = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
        lora = adapter(request.model)
        outputs = _generate(
            client, "grpc", source, params, request.origin, lora_request=lora, priority=request.priority
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for chunk in found.chunks(output):
                    yield chunk


def _generate(
    client: Any, kind: str, prompt: Any, params: Any, origin: Origin, **more: Any
) -> AsyncGenerator[Any, None]:
    """vLLM's outputs for one request, which its log calls by `kind` and the id of its origin."""
    name = f"{kind}-{origin.id}-{uuid.uuid4().hex[:8]}"
    outputs: AsyncGenerator[Any, None] = client.generate(
        prompt, params, name, trace_headers=dict(origin.trace) or None, **more
    )
    return outputs


async def chat(
    client: Any, serving: Any, body: Mapping[str, Any], origin: Origin
) -> AsyncGenerator[Mapping[str, Any], None]:
    """See `Engine.chat`. `serving` is vLLM's own for its HTTP API."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    with _translated():
        try:
            request = ChatCompletionRequest(**{**body, "seed": engine_seed(body.get("seed"))})
        except ValidationError as error:
            raise BadRequestError(reason(error)) from None
        try:
            answer = await serving.create_chat_completion(request, _http_request(origin))
        except Exception as error:
            raise _as_http_says(error) from error
        if isinstance(answer, ErrorResponse):
            raise _as_ours(answer.error.code, answer.error.message)
        if not body.get("stream"):
            yield answer.model_dump()
            return
        async with contextlib.aclosing(answer):
            async for event in answer:
                said = event.removeprefix("data: ").strip()
                if said in ("", "[DONE]"):
                    continue
                piece = from_json(said)
                if "error" in piece and client.errored:
                    raise EngineDiedError("the engine has died; this server is going down")
                if "error" in piece:
                    raise _as_ours(piece["error"].get("code"), piece["error"].get("message"))
                yield piece


def _http_request(origin: Origin) -> Request:
    """As if it had come over HTTP: vLLM takes a request's id and its trace from the header."""
    headers = {"x-request-id": origin.id, **origin.trace}
    raw = [(name.encode(), value.encode()) for name, value in headers.items() if value]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw})


def _as_http_says(error: Exception) -> Exception:
    """What is raised for an exception that vLLM's HTTP API would call the client's fault, else the exception.

    A part of what vLLM checks late raises plain `ValueError` or `TypeError`, and so does a chat template.
    """
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMError

    if isinstance(error, VLLMError):
        return error
    found = create_error_response(error).error
    return BadRequestError(found.message) if found.code < 500 or isinstance(error, NotImplementedError) else error


def _as_ours(status: int | None, message: str) -> Exception:
    """The exception for an error of vLLM's HTTP API."""
    kinds: dict[int | None, type[ServeError]] = {404: UnknownModelError, 429: OverloadedError, 503: OverloadedError}
    if status in kinds:
        return kinds[status](message)
    return BadRequestError(message) if status is not None and 400 <= status < 500 else RuntimeError(message)


async def tokenize(client: Any, text: str, special_tokens: bool) -> list[int]:
    """See `Engine.tokenize`."""
    tokenizer, longest = client.renderer.tokenizer, client.model_config.max_model_len
    if len(text) > longest * _CHARACTERS:
        raise BadRequestError(
            f"text has {len(text)} characters; expected at most {longest * _CHARACTERS}, {_CHARACTERS} for each token "
            "that the model can read"
        )
    ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special_tokens)
    return list(ids)


async def detokenize(client: Any, token_ids: Sequence[int], special_tokens: bool) -> str:
    """See `Engine.detokenize`."""
    tokenizer = client.renderer.tokenizer
    return str(await asyncio.to_thread(tokenizer.decode, list(token_ids), skip_special_tokens=not special_tokens))


async def score(client: Any, token_ids: list[int], adapter: Any, origin: Origin) -> list[float]:
    """See `Engine.score`. `adapter` is vLLM's object for one."""
    from vllm import SamplingParams

    longest = client.model_config.max_model_len - 1
    if not 2 <= len(token_ids) <= longest:
        raise BadRequestError(f"{len(token_ids)} tokens to score; expected 2 to {longest} (max_model_len - 1)")
    with _translated():
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": token_ids}
        async for output in _generate(client, "score", prompt, params, origin, lora_request=adapter):
            final = output
    return [final.prompt_logprobs[i][token_ids[i]].logprob for i in range(1, len(token_ids))]


async def embed(client: Any, token_ids: list[int], adapter: Any, origin: Origin) -> list[float]:
    """See `Engine.embed`. `adapter` is vLLM's object for one."""
    from vllm import PoolingParams

    longest = client.model_config.max_model_len
    if not 1 <= len(token_ids) <= longest:
        raise BadRequestError(f"{len(token_ids)} tokens to embed; expected 1 to {longest} (max_model_len)")
    name = f"embed-{origin.id}-{uuid.uuid4().hex[:8]}"
    prompt, params, trace = {"prompt_token_ids": token_ids}, PoolingParams(task="embed"), dict(origin.trace) or None
    with _translated():
        async for output in client.encode(prompt, params, name, lora_request=adapter, trace_headers=trace):
            final = output
    return [float(number) for number in final.outputs.data]


async def probe(client: Any) -> None:
    """See `Engine.probe`."""
    from vllm import PoolingParams, SamplingParams

    async def ask(replica: int) -> None:
        pools = client.model_config.runner_type == "pooling"
        params = (
            PoolingParams(task="embed") if pools else SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        )
        # what `generate` and `encode` begin with; `encode` itself asks no replica by its number
        name, prompt = f"probe-{uuid.uuid4().hex}", {"prompt_token_ids": [0]}
        outputs = await client.add_request(name, prompt, params, data_parallel_rank=replica)
        try:
            while not (await outputs.get()).finished:
                pass
        except asyncio.CancelledError:
            await client.abort(outputs.request_id, internal=True)
            raise

    replicas = client.vllm_config.parallel_config.data_parallel_size
    with _translated():
        await asyncio.gather(*map(ask, range(replicas)))


async def rests(client: Any) -> bool:
    """See `Engine.rests`."""
    with _translated():
        return bool(await client.is_sleeping())  # also while it is paused


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """vLLM's exceptions as ours. What is not listed is unexpected, and stays as it is."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except VLLMClientError as error:
        raise BadRequestError(str(error)) from error
    except GracefulHTTPError as error:
        raise OverloadedError(str(error)) from error
    except EngineDeadError as error:
        raise EngineDiedError("the engine has died; this server is going down") from error
