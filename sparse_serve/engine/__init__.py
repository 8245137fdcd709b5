"""The `Engine` protocol and its request and response types; independent of vLLM.

A request goes in as a `GenerateRequest`, tokens come out as `Chunk`s, and abandoning the iteration (closing it, or
cancelling the task that runs it) aborts the request in the engine. `fake.py` implements the same protocol without a
model, for tests of everything around the engine; `vllm_engine.py` is the real one.
"""

import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

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
    `embeds`: whether the model makes embeddings, and generates no text.
    `quality` is what was measured of the model when it was pruned, if that is known. The rest is a sparse checkpoint's
    manifest: its pattern, how values are stored, and the digests of its masks, its recipe and the dense model;
    and `changes`, what became of its tokenizer and other files since it was written, a line for each.
    `startup_s`: the seconds that each part of the start took, in order.
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
    embeds: bool = False
    pattern: str = ""
    values: str = ""
    mask_digest: str = ""
    recipe_digest: str = ""
    base_digest: str = ""
    changes: tuple[str, ...] = ()
    startup_s: Mapping[str, float] = field(default_factory=dict)


class Progress:
    """What an engine has done so far: tokens read and written, and when (`time.monotonic`) it last put anything out."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generated_tokens = 0
        self._steps_s = {0: time.monotonic()}

    def stepped(self, replica: int = 0) -> None:
        """A replica of the model has put something out."""
        self._steps_s[replica] = time.monotonic()

    @property
    def last_step_s(self) -> float:
        """Of several replicas, the one that put anything out least recently."""
        return min(self._steps_s.values())


class ConstraintKind(Enum):
    """What the text of an answer can be held to; the names are vLLM's."""

    JSON = "json"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Constraint:
    """What the text has to be. `texts`: the choices, else one text, the schema, expression or grammar, or none."""

    kind: ConstraintKind
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. `None` means the model's own default, then the engine's.

    `n` sequences are generated, each until it stops. `logit_bias` is added to scores, by token id.
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
    n: int = 1
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    constraint: Constraint | None = None


DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Origin:
    """Whose call a request is part of: what the engine's log calls it, which need not be the only one of its name, and
    its W3C trace context, the headers `traceparent` and `tracestate`, under which the engine reports its span."""

    id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)


NOBODY = Origin()


@dataclass(frozen=True)
class GenerateRequest:
    """A prompt, as text (special tokens are added) or as token ids (used as they are), and how to continue it.

    `model` is one of `Engine.models`; empty: the served model. The lower `priority`, the earlier it is its turn, in an
    engine that goes by that.
    """

    prompt: str | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    model: str = ""
    priority: int = 0
    origin: Origin = NOBODY


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


@dataclass(slots=True)
class Chunk:
    """What was generated since the chunk before, of sequence number `index`. The last one of each, and only it, has a
    `finish_reason`.

    Token counts are from the start of the request and of all its sequences. `first_token_s` and `elapsed_s` are from
    its start, too: to its first token, and to this chunk. `prompt_logprobs` (one per prompt token but the first) come
    with the first chunk. `text` may be empty while bytes of a character, or a possible stop string, are held back.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    index: int = 0
    cached_prompt_tokens: int = 0
    first_token_s: float = 0.0
    elapsed_s: float = 0.0


class Engine(Protocol):
    """A model that generates and scores. `start` once, use from one event loop, `stop` once."""

    async def start(self) -> EngineInfo:
        """Load the model. Raises `EngineStartError` or `SettingsError`, leaving no process behind."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names a request may ask for: those of the served model, `EngineInfo.model` first, then LoRA adapters."""

    @property
    def adapters(self) -> Collection[str]:
        """Those of `models` that are LoRA adapters."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate. Raises `BadRequestError`, `UnknownModelError`, `OverloadedError` or `EngineDiedError` while
        iterated."""

    def chat(self, body: Mapping[str, Any], origin: Origin = NOBODY) -> AsyncGenerator[Mapping[str, Any], None]:
        """Continue a conversation. `body` is a request of the OpenAI API's chat completions, and so are the answers:
        one with all, or with `stream` one for each piece. Raises what `generate` does."""

    async def tokenize(self, text: str, special_tokens: bool) -> list[int]:
        """The tokens of a text, with the special ones that a prompt gets, or without. `BadRequestError` for one that is
        too long for the model, whatever its tokens are."""

    async def detokenize(self, token_ids: Sequence[int], special_tokens: bool) -> str:
        """The text of tokens, with that of special ones, or without."""

    async def score(self, token_ids: list[int], model: str = "", origin: Origin = NOBODY) -> list[float]:
        """Natural log-probability of each token given those before it: `len(token_ids) - 1` numbers, as the first
        token has no prefix. Needs at least 2 tokens and at most `max_model_len - 1`, else `BadRequestError`."""

    async def embed(self, token_ids: list[int], model: str = "", origin: Origin = NOBODY) -> list[float]:
        """The embedding of 1 to `max_model_len` tokens, else `BadRequestError`; only if `EngineInfo.embeds`."""

    @property
    def progress(self) -> Progress:
        """What it has done so far; the same object each time, kept up to date."""

    async def probe(self) -> None:
        """Ask every replica of the model for one token, and return when all are there. Raises `EngineDiedError` or
        `OverloadedError`."""

    async def rests(self) -> bool:
        """Whether the engine makes no steps because it was told so: it is paused, or sleeps."""

    @property
    def died(self) -> bool:
        """Whether a started engine is gone without `stop` having been called."""

    async def stop(self, grace_s: float) -> None:
        """Give everything back, also while `start` is still running. Processes get `grace_s` seconds to end
        themselves before they are killed. Calling it again does nothing."""
