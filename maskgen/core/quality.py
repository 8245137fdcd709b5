"""How good a pruned model is: measured when it was made, kept beside its weights, shown wherever people stand.

`maskgen run` measures a few windows of text that nothing was calibrated or trained on, before and after pruning, and
writes what it found as `maskgen_quality.json`; `maskgen eval --against DENSE --keep` writes it for a model that has
none. `maskgen inspect`, `sparse-serve doctor` and the server read it. It is a note for people: nothing is decided by
it, and when values change (`maskgen quantise`) it is not carried over.

The file may come from anywhere: its keys are these and no others, numbers are finite and in range, and names can hold
nothing that a terminal would act on. What to try when a model is bad stands here and nowhere else (`NEXT`).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from maskgen.core.errors import FormatError, PatternError, clip
from maskgen.core.files import read_json
from maskgen.core.pattern import NMPattern

logger = logging.getLogger(__name__)

QUALITY_FILE = "maskgen_quality.json"
UNKNOWN = "not known; `maskgen eval {} --against DENSE --data TEXT --keep` measures it and keeps it beside the weights"
"""For people, about a directory without a measurement: how to get one."""

UNKNOWN_METHOD = "unknown"
"""The method of a model that does not say how it was made."""

BAD_INCREASE = 0.25
"""A perplexity that is higher than dense by more than this share of it is called bad."""

_FORMAT_VERSION = 1
_MAX_FILE_BYTES = 1 << 16
_MAX_COUNT = 1 << 24
MAX_TEXTS = 16
_MAX_NAME_CHARS, _SHOWN_TEXTS = 128, 3
_METHOD = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Quality:
    """Held-out perplexity of the dense model and of what was made of it, and how far the two are from each other.

    `kl` is KL(dense || pruned) in nats per token and `agreement` the share of positions with the same most likely token
    (`maskgen.core.divergence`), over `windows` windows of `window_tokens` tokens of `texts`, each beginning with BOS if
    `bos`. `method` is the recipe's, `pattern` its N:M pattern, "" for a model without one.
    """

    dense_perplexity: float
    perplexity: float
    kl: float
    agreement: float
    windows: int
    window_tokens: int
    bos: bool
    texts: tuple[str, ...]
    method: str
    pattern: str = ""

    def __post_init__(self) -> None:
        most = {"dense_perplexity": math.inf, "perplexity": math.inf, "kl": math.inf, "agreement": 1.0}
        for name, limit in most.items():
            value = getattr(self, name)
            if type(value) is not float or not math.isfinite(value) or not 0 <= value <= limit:
                raise FormatError(f"{name} {clip(value)}, expected a finite number from 0 to {limit:g}")
        for name in ("windows", "window_tokens"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_COUNT:
                raise FormatError(f"{name} {clip(value)}, expected a whole number from 1 to {_MAX_COUNT}")
        if type(self.bos) is not bool:
            raise FormatError(f"bos {clip(self.bos)}, expected true or false")
        if not 1 <= len(self.texts) <= MAX_TEXTS or not all(map(_is_name, self.texts)):
            raise FormatError(f"texts {clip(self.texts)}, expected 1 to {MAX_TEXTS} printable names")
        if not is_method(self.method):
            raise FormatError(f"method {clip(self.method)}, expected a method's name")
        if type(self.pattern) is not str or (self.pattern and not _is_pattern(self.pattern)):
            raise FormatError(f"pattern {clip(self.pattern)}, expected an N:M pattern, or nothing")

    @property
    def increase(self) -> float:
        """How much higher the perplexity is than dense, as a share of dense: 0 is as good, 1 is twice as high."""
        return self.perplexity / max(self.dense_perplexity, 1.0) - 1

    @property
    def is_bad(self) -> bool:
        """Whether people should be told that this model is bad."""
        return self.increase > BAD_INCREASE

    def describe(self) -> str:
        """One line for people, without advice."""
        names = ", ".join(self.texts[:_SHOWN_TEXTS]) + (", ..." if len(self.texts) > _SHOWN_TEXTS else "")
        digits = 1 if abs(self.increase) < 0.1 else 0
        percent = round(100 * self.increase, digits) + 0.0  # never -0.0
        return (
            f"perplexity {_number(self.dense_perplexity)} dense -> {_number(self.perplexity)} "
            f"{self.pattern or 'pruned'} ({percent:+,.{digits}f} %), KL {self.kl:.3f} nats per token, "
            f"top-1 agreement {self.agreement:.1%}, on {self.windows} held-out windows of {self.window_tokens} tokens "
            f"of {names}"
        )

    def advice(self) -> list[str]:
        """For a bad model, what to try next, what helps most first; else nothing."""
        return [step.text for step in NEXT if self.method in step.after] if self.is_bad else []

    def lines(self) -> list[str]:
        """All that there is to say to people."""
        lines = [self.describe()]
        if self.is_bad:
            advice = self.advice()
            what_next = "; what to try next, in this order:" if advice else ""
            lines.append(f"that is bad: more than +{BAD_INCREASE:.0%}{what_next}")
            lines += [f"{number}. {text}" for number, text in enumerate(advice, 1)]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The JSON object in the file."""
        return {"format_version": _FORMAT_VERSION, **asdict(self), "texts": list(self.texts)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Quality:
        """Read the JSON object; `FormatError` on anything else."""
        names = {field.name for field in fields(cls)}
        if set(value) != {"format_version", *names}:
            raise FormatError(f"keys {clip(sorted(value))}, expected {sorted({'format_version', *names})}")
        if value["format_version"] != _FORMAT_VERSION or type(value["format_version"]) is not int:
            raise FormatError(f"format_version {clip(value['format_version'])}, this release reads {_FORMAT_VERSION}")
        if not isinstance(value["texts"], list):
            raise FormatError(f"texts {clip(value['texts'])}, expected a list")
        return cls(**{**{name: value[name] for name in names}, "texts": tuple(value["texts"])})


@dataclass(frozen=True)
class Step:
    """Something to try with a bad model, and after which methods it is of use."""

    text: str
    after: frozenset[str]


_SCORED, _SOLVED, _LEARNED = {"wanda", "ria"}, {"sparsegpt", "admm"}, {"maskllm", "proxsparse"}
_FITTED = {"reconstruct"}
NEXT = (
    Step(
        "`maskgen run best-effort`, the best there is: ADMM, then training with the dense model as teacher. "
        "SmolLM2-135M on news: perplexity 102.9 after SparseGPT, 54.7 after ADMM, 42.9 after 100 steps, 27.4 dense. "
        "--prior SPARSE trains this result further instead",
        frozenset(_SCORED | _SOLVED | _FITTED | _LEARNED | {"magnitude", UNKNOWN_METHOD}),
    ),
    Step(
        "more calibration text, and closer to what the model will read (--data, --set calibration.samples=...)",
        frozenset(_SCORED | _SOLVED | _FITTED),
    ),
    Step(
        "`maskgen run sparsegpt` or `maskgen run admm`, which also repair the weights that stay",
        frozenset(_SCORED | {"magnitude"}),
    ),
    Step(
        "`maskgen run reconstruct`, which trains the weights that stay, one block at a time against the dense one "
        "(--prior SPARSE goes on from this result)",
        frozenset(_SCORED | _SOLVED | {"magnitude", UNKNOWN_METHOD}),
    ),
    Step(
        "more training text and more steps (--data, --set train.steps=...)",
        frozenset(_LEARNED | {"adaptive_sparse", "maskprune"}),
    ),
)
"""What to try when a model is bad, what helps most first."""


def is_method(name: object) -> TypeGuard[str]:
    """Whether this can be a method's name."""
    return isinstance(name, str) and _METHOD.fullmatch(name) is not None


def name_for_people(name: str) -> str:
    """A text's name as it can be stored and shown: short, and printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:_MAX_NAME_CHARS] or "?"


def stored(quality: Quality | str) -> dict[str, Any]:
    """Files to write beside the weights, by name: the measurement, if there is one and not a reason for none."""
    return {} if isinstance(quality, str) else {QUALITY_FILE: quality.to_dict()}


def read_quality(model_dir: Path) -> Quality | None:
    """What was measured when this model was made, or None where nothing is kept. `FormatError` for a damaged file."""
    path = model_dir / QUALITY_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_FILE_BYTES} are read; delete it")
    try:
        return Quality.from_dict(read_json(path))
    except FormatError as error:
        raise FormatError(f"{path}: {error}; delete it, or measure again with maskgen eval --keep") from None


def known_quality(model_dir: Path) -> Quality | None:
    """As `read_quality`; None, and a warning in the log, for a damaged file, which is no reason to stop at."""
    try:
        return read_quality(model_dir)
    except FormatError as error:
        logger.warning("the quality of this model is not known: %s", error)
        return None


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 1 <= len(name) <= _MAX_NAME_CHARS and name.isprintable()


def _is_pattern(text: str) -> bool:
    try:
        return str(NMPattern.parse(text)) == text
    except PatternError:
        return False


def _number(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.3g}"
