"""What the gate is asked: which two models, on which text, and how much worse the sparse one may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sparse_serve.gate.config import DType, GateConfig, QualityConfig, TargetConfig
from sparse_serve.gate.evidence import Limits
from sparse_serve.runtime.request import Request

_DEFAULTS = Limits()


class GateRequest(Request):
    """May `sparse` replace `dense`? Raises `SettingsError` for a value out of range or an unknown field.

    `dense` and `sparse` are model directories, `data` is held-out text, a file that `maskgen eval` reads.
    `dtype` is what both stacks compute in, by default the checkpoint's. `window_tokens` is the length of the windows
    perplexity is measured on, by default 2048 or half the model's context if that is less; `max_windows` measures only
    the first so many. `bos` says whether they begin with BOS, by default as the tokenizer does by itself. For the
    limits see `sparse_serve.gate.evidence.Limits`; `parity_tolerance=None` is 0.001 in float32 and 0.01 in 16 bits.
    `allow_other_base` compares although `sparse` was not made from `dense`.
    """

    dense: Path
    sparse: Path
    data: Path
    dtype: DType | None = None
    window_tokens: Annotated[int, Field(ge=2)] | None = None
    max_windows: Annotated[int, Field(ge=1)] | None = None
    bos: bool | None = None
    max_ppl_increase: Annotated[float, Field(gt=-1, allow_inf_nan=False)] = _DEFAULTS.max_ppl_increase
    parity_tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    alpha: Annotated[float, Field(gt=0, lt=0.5, allow_inf_nan=False)] = _DEFAULTS.alpha
    allow_other_base: bool = False

    def config(self) -> GateConfig:
        """The long form of it."""
        quality = QualityConfig(
            texts=[self.data],
            max_ppl_increase=self.max_ppl_increase,
            alpha=self.alpha,
            parity_tolerance=self.parity_tolerance,
            window_tokens=self.window_tokens,
            max_windows=self.max_windows,
            bos=self.bos,
        )
        return GateConfig(
            version=1,
            base=TargetConfig(model=self.dense),
            candidate=TargetConfig(model=self.sparse),
            dtype=self.dtype,
            allow_other_base=self.allow_other_base,
            quality=quality,
        )


@dataclass(frozen=True)
class GateStep:
    """One of the gate's `steps` measurements begins, or goes on: `number` counts from 1, `what` says what it does."""

    number: int
    steps: int
    what: str


OnStep = Callable[[GateStep], None]
