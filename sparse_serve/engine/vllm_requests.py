"""One request to a running `AsyncLLM`: generation, log-probabilities, a sign of life.

Perplexity: `score` asks for `prompt_logprobs=0`, the log-probability of each actual prompt token. vLLM computes it as
a float32 log-softmax over the whole vocabulary, so it is exact.
"""

import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from sparse_serve.engine import Chunk, GenerateRequest
from sparse_serve.engine.vllm_values import sampling_arguments, to_chunk
from sparse_serve.runtime.errors import BadRequestError, EngineDiedError, OverloadedError


async def generate(client: Any, request: GenerateRequest, adapter: Callable[[str], Any]) -> AsyncGenerator[Chunk, None]:
    """See `Engine.generate`. `adapter` gives vLLM's object for the model that the request names."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompt = request.prompt
    source = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
    model = client.model_config
    arguments = sampling_arguments(request.sampling, model.get_diff_sampling_param(), model.max_model_len)
    completion_tokens = 0
    with _translated():
        params = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
        name, lora = f"grpc-{uuid.uuid4().hex}", adapter(request.model)
        outputs = client.generate(source, params, name, lora_request=lora)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                completion_tokens += len(output.outputs[0].token_ids)
                yield to_chunk(output, completion_tokens, request.sampling)


async def score(client: Any, token_ids: list[int]) -> list[float]:
    """See `Engine.score`."""
    from vllm import SamplingParams

    longest = client.model_config.max_model_len - 1
    if not 2 <= len(token_ids) <= longest:
        raise BadRequestError(f"{len(token_ids)} tokens to score; expected 2 to {longest} (max_model_len - 1)")
    with _translated():
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": token_ids}
        async for output in client.generate(prompt, params, f"score-{uuid.uuid4().hex}"):
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
