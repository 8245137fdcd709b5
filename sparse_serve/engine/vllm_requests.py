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

from sparse_serve.engine import Chunk, GenerateRequest
from sparse_serve.engine.vllm_values import Outputs, constraint_arguments, sampling_arguments
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


async def generate(client: Any, request: GenerateRequest, adapter: Callable[[str], Any]) -> AsyncGenerator[Chunk, None]:
    """See `Engine.generate`. `adapter` gives vLLM's object for the model that the request names."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    prompt = request.prompt
    source = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
    model = client.model_config
    sampling, found = request.sampling, Outputs(request.sampling)
    arguments = sampling_arguments(sampling, model.get_diff_sampling_param(), model.max_model_len)
    with _translated():
        if sampling.constraint is not None:
            arguments["structured_outputs"] = StructuredOutputsParams(**constraint_arguments(sampling.constraint))
        params = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
        name, lora = f"grpc-{request.id}-{uuid.uuid4().hex[:8]}", adapter(request.model)
        outputs = client.generate(source, params, name, lora_request=lora, priority=request.priority)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for chunk in found.chunks(output):
                    yield chunk


async def chat(client: Any, serving: Any, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
    """See `Engine.chat`. `serving` is vLLM's own for its HTTP API."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    with _translated():
        try:
            request = ChatCompletionRequest(**body)
        except ValidationError as error:
            raise BadRequestError(reason(error)) from None
        answer = await serving.create_chat_completion(request)
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


async def score(client: Any, token_ids: list[int], adapter: Any = None) -> list[float]:
    """See `Engine.score`. `adapter` is vLLM's object for one."""
    from vllm import SamplingParams

    longest = client.model_config.max_model_len - 1
    if not 2 <= len(token_ids) <= longest:
        raise BadRequestError(f"{len(token_ids)} tokens to score; expected 2 to {longest} (max_model_len - 1)")
    with _translated():
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": token_ids}
        async for output in client.generate(prompt, params, f"score-{uuid.uuid4().hex}", lora_request=adapter):
            final = output
    return [final.prompt_logprobs[i][token_ids[i]].logprob for i in range(1, len(token_ids))]


async def probe(client: Any) -> None:
    """See `Engine.probe`."""
    from vllm import SamplingParams

    with _translated():
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        async for _ in client.generate({"prompt_token_ids": [0]}, params, f"probe-{uuid.uuid4().hex}"):
            pass


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
