"""An engine without a model: it echoes the prompt. For tests of what stands around an engine.

Output token i is prompt token i modulo the prompt's length, a token id is a character's code point, and every
log-probability is minus the token id over 1000: all of it predictable from the request. It records what was aborted
and counts what is unfinished, and can be slow (`delay_s` per token), fail a request (`fail_with`), fail to start, hang
(`hangs`; if it is also `paused`, it says so), or die.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from maskgen.core.quality import Quality
from sparse_serve.engine import (
    DEFAULT_MAX_TOKENS,
    NOBODY,
    Chunk,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    KernelChoice,
    Origin,
    PositionLogprobs,
    Progress,
    TokenLogprob,
)
from sparse_serve.runtime.errors import EngineDiedError

INFO = EngineInfo(
    model="fake",
    max_model_len=4096,
    vocab_size=0x110000,
    dtype="float32",
    sparse_layers=3,
    dense_layers=1,
    kernels={"reference": 2, "cpu": 1},
    choices=(KernelChoice(64, 32, "float", 4, "cpu", 1.5),),
    sparse_weight_bytes=900,
    dense_equivalent_bytes=1600,
    quality=Quality(20.0, 50.0, 0.75, 0.5, 16, 512, False, ("a.txt",), "sparsegpt", "2:4"),
)


class FakeEngine:
    """Implements `Engine`. The attributes may be changed at any time; they take effect with the next token.

    A start takes `start_s`, or until `start_over` is set.
    """

    def __init__(self, delay_s: float = 0.0, start_s: float = 0.0, start_error: Exception | None = None) -> None:
        self.delay_s = delay_s
        self.start_s = start_s
        self.start_over = asyncio.Event()
        self.start_error = start_error
        self.fail_with: Exception | None = None
        self.models: tuple[str, ...] = (INFO.model,)
        self.adapters: tuple[str, ...] = ()
        self.embeds = False
        self.started = False
        self.stopped = False
        self.aborted: list[GenerateRequest] = []
        self.requests: list[GenerateRequest] = []
        self.origins: list[Origin] = []
        self.unfinished = 0
        self._dead = False
        self.hangs = self.paused = False
        self.progress = Progress()

    async def start(self) -> EngineInfo:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.start_over.wait(), self.start_s)
        if self.start_error is not None:
            raise self.start_error
        self.started = True
        return replace(INFO, embeds=self.embeds)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.unfinished += 1
        try:
            async for chunk in self._chunks(request):
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request)
            raise
        finally:
            self.unfinished -= 1

    async def _chunks(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        ids = list(map(ord, request.prompt)) if isinstance(request.prompt, str) else list(request.prompt)
        sampling = request.sampling
        room = INFO.max_model_len - len(ids)
        count = min(sampling.max_tokens or DEFAULT_MAX_TOKENS, room)
        for index in range(count):
            await asyncio.sleep(1e9 if self.hangs else self.delay_s)
            self.progress.stepped()
            if self._dead:
                raise EngineDiedError("the engine is gone")
            if self.fail_with is not None:
                raise self.fail_with
            token = ids[index % len(ids)]
            stopped = token in sampling.stop_token_ids or chr(token) in sampling.stop
            last = FinishReason.STOP if stopped else FinishReason.LENGTH if index + 1 == count else None
            for sequence in range(sampling.n):
                yield Chunk(
                    text=chr(token),
                    token_ids=(token,),
                    prompt_tokens=len(ids),
                    completion_tokens=index + 1,
                    finish_reason=last,
                    logprobs=() if sampling.logprobs is None else (_logprobs(token, sampling.logprobs),),
                    prompt_logprobs=tuple(_logprobs(id_, sampling.prompt_logprobs) for id_ in ids[1:])
                    if sampling.prompt_logprobs is not None and index == sequence == 0
                    else (),
                    index=sequence,
                )
            if stopped:
                return

    async def chat(self, body: Mapping[str, Any], origin: Origin = NOBODY) -> AsyncGenerator[Mapping[str, Any], None]:
        """Says the last message again, and calls the first tool with it."""
        self.origins.append(origin)
        text = body["messages"][-1]["content"]
        usage = {"prompt_tokens": len(text), "completion_tokens": len(text)}
        calls = [
            {
                "id": "call-0",
                "index": 0,
                "function": {"name": tool["function"]["name"], "arguments": f'{{"x": "{text}"}}'},
            }
            for tool in (body.get("tools") or [])[:1]
        ]
        finish = "tool_calls" if calls else "stop"
        if not body.get("stream"):
            message = {"role": "assistant", "content": text, "tool_calls": calls, "reasoning": None}
            yield {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}
            return
        for character in text:
            yield {"choices": [{"index": 0, "delta": {"content": character}, "finish_reason": None}]}
        yield {"choices": [{"index": 0, "delta": {"tool_calls": calls}, "finish_reason": finish}]}
        yield {"choices": [], "usage": usage}

    async def tokenize(self, text: str, special_tokens: bool) -> list[int]:
        return [*([1] if special_tokens else []), *map(ord, text)]

    async def detokenize(self, token_ids: Sequence[int], special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))

    async def score(self, token_ids: list[int], model: str = "", origin: Origin = NOBODY) -> list[float]:
        self.origins.append(origin)
        return [-id_ / 1000 for id_ in token_ids[1:]]

    async def embed(self, token_ids: list[int], model: str = "", origin: Origin = NOBODY) -> list[float]:
        self.origins.append(origin)
        return [float(len(token_ids)), token_ids[0] / 1000]

    async def probe(self) -> None:
        await asyncio.sleep(1e9 if self.hangs else 0.0)
        self.progress.stepped()

    async def rests(self) -> bool:
        await asyncio.sleep(1e9 if self.hangs and not self.paused else 0.0)
        return self.paused

    @property
    def died(self) -> bool:
        return self._dead and not self.stopped

    def die(self) -> None:
        """What a killed engine process looks like."""
        self._dead = True

    async def stop(self, grace_s: float) -> None:
        self.stopped = True


def _logprobs(token: int, top: int) -> PositionLogprobs:
    best = tuple(TokenLogprob(rank, -rank / 1000) for rank in range(top))
    return PositionLogprobs(TokenLogprob(token, -token / 1000), best)
