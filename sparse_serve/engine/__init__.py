"""The `Engine` protocol and its request and response types; independent of vLLM.

A request goes in as a `GenerateRequest`, tokens come out as `Chunk`s, and abandoning the iteration (closing it, or
cancelling the task that runs it) aborts the request in the engine. `fake.py` implements the same protocol without a
model, for tests of everything around the engine; `vllm_engine.py` is the real one.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # it imports torch, which a client does without
    from maskgen.core.quality import Quality


@dataclass(frozen=True)
class KernelChoice:
    """What serves a kind of layer (of one rank) with up to `tokens` tokens, and how much faster than dense it was."""

    out_features: int
    in_features: int
    values: str
    tokens: int
    kernel: str
    speedup: float


@dataclass(frozen=True)
class EngineInfo:
    """What a started engine serves. Set once, by `Engine.start`.

    `kernels` counts sparse layers per kernel. Layers the engine fuses (query, key and value) count once. `choices` are
    those that were measured, of several ranks the slowest; none if kernels were asked for by name, or none had a
    competitor. `sparse_weight_bytes` is what those layers' weights take in memory, `dense_equivalent_bytes` what they
    would take dense; both are 0 for a dense model. `chat`: whether there is a chat template, which chat requests need.
    `quality` is what was measured of the model when it was pruned, if that is known.
    """

    model: str
    max_model_len: int
    vocab_size: int
    dtype: str
    sparse_layers: int = 0
    dense_layers: int = 0
    kernels: Mapping[str, int] = field(default_factory=dict)
    choices: tuple[KernelChoice, ...] = ()
    sparse_weight_bytes: int = 0
    dense_equivalent_bytes: int = 0
    quality: "Quality | None" = None
    chat: bool = False


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. `None` means the model's own default, then the engine's.

    `logprobs` and `prompt_logprobs`: 0 asks for the chosen (actual) token's log-probability alone, k for the k most
    likely ones too, `None` for none.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class GenerateRequest:
    """A prompt, as text (special tokens are added) or as token ids (used as they are), and how to continue it.

    `model` is one of `Engine.models`; empty: the served model.
    """

    prompt: str | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    model: str = ""


class FinishReason(Enum):
    """Why generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class PositionLogprobs:
    """The token at a position, and the most likely ones there, best first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What was generated since the chunk before. The last one, and only it, has a `finish_reason`.

    Token counts are from the start of the request. `prompt_logprobs` (one per prompt token but the first) come with
    the first chunk. `text` may be empty while bytes of a character, or a possible stop string, are held back.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


class Engine(Protocol):
    """A model that generates and scores. `start` once, use from one event loop, `stop` once."""

    async def start(self) -> EngineInfo:
        """Load the model. Raises `EngineStartError` or `SettingsError`, leaving no process behind."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names a request may ask for: those of the served model, `EngineInfo.model` first, then LoRA adapters."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate. Raises `BadRequestError`, `UnknownModelError`, `OverloadedError` or `EngineDiedError` while
        iterated."""

    async def score(self, token_ids: list[int]) -> list[float]:
        """Natural log-probability of each token given those before it: `len(token_ids) - 1` numbers, as the first
        token has no prefix. Needs at least 2 tokens and at most `max_model_len - 1`, else `BadRequestError`."""

    @property
    def last_step_s(self) -> float:
        """When, by `time.monotonic`, the engine last put anything out."""

    async def probe(self) -> None:
        """Ask for one token, and return when it is there. Raises `EngineDiedError` or `OverloadedError`."""

    @property
    def died(self) -> bool:
        """Whether a started engine is gone without `stop` having been called."""

    async def stop(self, grace_s: float) -> None:
        """Give everything back, also while `start` is still running. Processes get `grace_s` seconds to end
        themselves before they are killed. Calling it again does nothing."""
