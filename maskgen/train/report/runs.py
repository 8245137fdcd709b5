"""Training runs as a report sees them: the log, read back and checked.

A log may be unfinished, damaged or a stranger's. What numbers are computed from is checked here, field by field; what
is only shown stays as it was read, and the page escapes it. Kinds of lines and fields that are not known are passed
over, so that a log of a later release can still be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from maskgen.core.errors import FormatError, clip
from maskgen.sweep.workdir import work_dir
from maskgen.train.log import LOG_FILE, WORK_LOG_FILE, read

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Seconds = Annotated[float, Field(ge=0)]
_Kept = Annotated[str, StringConstraints(pattern=r"^[01]{1,64}$")]

_BLOCK = re.compile(r"(?:^|\.)([0-9]{1,6})(?:\.|$)")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Named(_Record):
    """A method in a recipe."""

    name: str


class TrainSettings(_Record):
    """What a report says about how a run was trained."""

    steps: _Count
    batch: _Count
    window_tokens: _Count
    seed: int = 0
    dtype: str = "?"


class Recipe(_Record):
    """The parts of a resolved recipe that are spoken of."""

    pattern: str
    method: Named
    train: TrainSettings


class WindowStart(_Record):
    """What windows of text begin with; see `maskgen.data.bos.Bos`."""

    ids: list[int]
    own: bool | None = None


class Header(_Record):
    """First line of a log; losses below are over `heldout_windows` windows."""

    recipe: Recipe
    digests: dict[str, str | None]
    model: str
    heldout_windows: _Count
    bos: WindowStart | None = None
    data: list[str] = []
    reference: str = "start"


class Step(_Record):
    """One optimiser step; losses in nats per token. `lr` and what follows are as in `train.step.TrainingStep`."""

    step: _Count
    loss: float
    cross_entropy: float
    divergence: float
    gradient_norm: float
    lr: float
    tokens: _Count
    elapsed_s: _Seconds
    peak_memory_bytes: _Count


class Eval(_Record):
    """One look at the masks as they would be exported; see `train.loop.HeldOut`."""

    step: _Count
    perplexity: Annotated[float, Field(gt=0)]
    agreement: _Fraction
    flipped: _Fraction
    elapsed_s: _Seconds
    dense_perplexity: Annotated[float, Field(gt=0)] | None = None


class LayerMasks(_Record):
    """The mask of one layer at the end. `patterns` counts groups by what they keep ("1100": the first two columns)."""

    agreement: _Fraction
    patterns: dict[_Kept, _Count]


class _Layers(_Record):
    layers: dict[str, LayerMasks]


_Kind = TypeVar("_Kind", bound=_Record)


@dataclass(frozen=True)
class Run:
    """One run. `name` is what the user called it, `facts` the header as it was read."""

    name: str
    header: Header
    facts: Mapping[str, Any]
    steps: Sequence[Step]
    evals: Sequence[Eval]
    layers: Mapping[str, LayerMasks]

    @property
    def steps_done(self) -> int:
        """Optimiser steps in the log."""
        return self.steps[-1].step if self.steps else 0

    @property
    def finished(self) -> bool:
        """Whether the log reaches the last step of the recipe."""
        return self.steps_done >= self.header.recipe.train.steps

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return sum(step.tokens for step in self.steps)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, evaluations included."""
        last = [step.elapsed_s for step in self.steps[-1:]] + [look.elapsed_s for look in self.evals[-1:]]
        return max(last, default=0.0)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest resident set of the process (host memory)."""
        return max((step.peak_memory_bytes for step in self.steps), default=None)

    @property
    def dense_perplexity(self) -> float | None:
        """Of the model without any sparsity, on the held-out windows."""
        return next((look.dense_perplexity for look in self.evals if look.dense_perplexity is not None), None)

    def tokens_per_s(self) -> Iterator[tuple[int, float]]:
        """Speed of every step whose begin is known: the end of the step or of the evaluation before it."""
        ends = {look.step: look.elapsed_s for look in self.evals}
        before: Step | None = None
        for step in self.steps:
            began_s = max(ends.get(step.step - 1, 0.0), 0.0 if before is None else before.elapsed_s)
            if began_s and step.elapsed_s > began_s:
                yield step.step, step.tokens / (step.elapsed_s - began_s)
            before = step


def load(source: Path) -> Run:
    """Read the run at `source`: an output directory, a work directory, or a log file.

    Raises `FormatError` for what is no log, `OSError` for what cannot be read.
    """
    path = find(source)
    records = read(path)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(str(record.get("kind")), []).append(record)
    steps = [_check(Step, record, path) for record in by_kind.get("step", [])]
    evals = [_check(Eval, record, path) for record in by_kind.get("eval", [])]
    for kind, numbers in (("step", [s.step for s in steps]), ("eval", [e.step for e in evals])):
        if any(high <= low for low, high in pairwise(numbers)):
            raise FormatError(f"{path}: damaged: lines of kind {kind!r} are not in the order of their steps")
    layers = [_check(_Layers, record, path) for record in by_kind.get("layers", [])]
    header = _check(Header, records[0], path)
    if len({len(kept) for record in layers for masks in record.layers.values() for kept in masks.patterns}) > 1:
        raise FormatError(f"{path}: damaged: patterns of different lengths")
    return Run(str(source), header, records[0], steps, evals, layers[-1].layers if layers else {})


def find(source: Path) -> Path:
    """The log of `source`; a run named by its output directory is found while it is still at work."""
    if source.is_file():
        return source
    for path in (source / LOG_FILE, source / WORK_LOG_FILE, work_dir(source) / WORK_LOG_FILE):
        if path.is_file():
            return path
    raise FormatError(
        f"{source}: {'holds no log' if source.exists() else 'no such run'}; expected what `maskgen run` with a learned "
        f"method wrote (a directory with {LOG_FILE}), the OUT.work of one that is running, or a log file"
    )


def place(name: str) -> tuple[str, int | None]:
    """A layer's row and column in a picture of the model: `layers.3.mlp.up_proj` is ("layers.*.mlp.up_proj", 3).

    The first number in the name is taken for the block's; a layer without one has column None.
    """
    found = _BLOCK.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start(1)]}*{name[found.end(1) :]}", int(found[1])


def _check(kind: type[_Kind], record: Mapping[str, Any], path: Path) -> _Kind:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        at = f" of step {clip(record['step'])}" if "step" in record else ""
        got = "" if problem["type"] == "missing" else f", got {clip(problem['input'])}"
        raise FormatError(
            f"{path}: damaged: in the line of kind {clip(record.get('kind'))}{at}: {clip(where)}: "
            f"{problem['msg'].lower()}{got}"
        ) from None
