"""Tasks through two servers: which samples each of them answers correctly.

A task is one of the pack's (`task_pack`) or a file of JSON lines, `{"prompt": ..., "choices": [...], "answer": index}`.
A server answers with the choice whose whole text, prompt and choice, it finds most likely; the prompt is the same in
all, so only the choices and the boundary to them count. A tie counts as wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskgen.core.digest import digest_json
from maskgen.core.errors import clip
from sparse_serve.gate import task_pack
from sparse_serve.gate.endpoint import Endpoint
from sparse_serve.gate.evidence import TaskEvidence
from sparse_serve.gate.task_pack import Sample
from sparse_serve.runtime.errors import SettingsError

_MAX_FILE_BYTES = 1 << 28


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=64)]
    answer: Annotated[int, Field(ge=0)]


def read(task: str, most: int | None) -> list[Sample]:
    """The samples of a task: a name of the pack, else a file. `SettingsError` for what is none."""
    if task in task_pack.NAMES:
        return task_pack.samples(task)[:most]
    path = Path(task)
    if not path.is_file():
        raise SettingsError(f"task {task}: no such file, and not one of {', '.join(task_pack.NAMES)}")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise SettingsError(f"task {path}: {path.stat().st_size} bytes; expected at most {_MAX_FILE_BYTES}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SettingsError(f"task {path}: is no text: {error}") from None
    found = [_sample(line, f"task {path}, line {at}") for at, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise SettingsError(f"task {path}: holds no sample")
    return found[:most]


def _sample(line: str, where: str) -> Sample:
    try:
        value = _Line.model_validate(json.loads(line))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SettingsError(f"{where}: is no JSON: {error}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"])) or "it"
        raise SettingsError(f"{where}: {key}: {clip(problem['input'])}: {problem['msg'].lower()}") from None
    if value.answer >= len(value.choices):
        raise SettingsError(f"{where}: answer: {value.answer}: there are {len(value.choices)} choices, counted from 0")
    if len(set(value.choices)) != len(value.choices):
        raise SettingsError(f"{where}: choices: {clip(value.choices)}: has an entry twice")
    return Sample(value.prompt, tuple(value.choices), value.answer)


def measure(
    name: str, samples: Sequence[Sample], base: Endpoint, candidate: Endpoint, on_target: Callable[[str], None]
) -> TaskEvidence:
    """Ask both servers for every sample. Raises `GateError` when one fails."""
    on_target(f"{name}: {len(samples)} samples, base")
    left = correct(samples, base)
    right = left
    if not base.is_same(candidate):  # a recording has one target
        on_target(f"{name}: {len(samples)} samples, candidate")
        right = correct(samples, candidate)
    return TaskEvidence(name, left, right, digest_json([asdict(sample) for sample in samples]))


def correct(samples: Sequence[Sample], endpoint: Endpoint) -> list[bool]:
    """Whether the right choice is the most likely one, sample by sample."""
    texts = [sample.prompt + choice for sample in samples for choice in sample.choices]
    totals = iter([math.fsum(scored.logprobs) for scored in endpoint.score_all(texts, 1)])
    found = []
    for sample in samples:
        likely = [next(totals) for _ in sample.choices]
        right = likely.pop(sample.answer)
        found.append(right > max(likely))
    return found
