"""Rounds of speed from the result files of other load generators, in place of rounds that the gate measures.

    AIPerf      `profile_export.jsonl`, a record for each request (`profile_export_aiperf.json` has no single requests)
    GuideLLM    `benchmarks.json` of one load, with its requests
    vLLM        the JSON file of `vllm bench serve --save-result --save-detailed`

A file is one run of one target. AIPerf and GuideLLM keep a request's mean time between tokens, so percentiles of `itl`
are those of requests. Requests that failed, were cancelled or did not end are counted, and make the round an error. A
file of another form, and numbers that are none, are a `SettingsError` of one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from maskgen.core.errors import SparseError, clip
from maskgen.core.files import MAX_JSON_BYTES, read_json
from sparse_serve.gate.config import SpeedConfig
from sparse_serve.gate.evidence import SpeedEvidence, SpeedRound, SpeedRun
from sparse_serve.runtime.errors import SettingsError

Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

_MS = {"ms": 1.0, "s": 1e3, "sec": 1e3, "us": 1e-3, "ns": 1e-6}
"""Milliseconds in a unit, by AIPerf's names of it."""


class _Value(BaseModel):
    value: Number | list[Number]
    unit: str


class _AiperfMetadata(BaseModel):
    request_start_ns: Count
    request_end_ns: Count
    benchmark_phase: str = "profiling"
    was_cancelled: bool = False


class _AiperfRecord(BaseModel):
    """A line of AIPerf's `profile_export.jsonl`; of its metrics, those that are used are `_Value`s."""

    metadata: _AiperfMetadata
    metrics: dict[str, Any]
    error: dict[str, Any] | None = None


class _GuidellmRequest(BaseModel):
    request_start_time: Number
    request_end_time: Number
    time_to_first_token_ms: Number
    inter_token_latency_ms: Number | None = None
    output_tokens: Count


class _GuidellmRequests(BaseModel):
    successful: list[_GuidellmRequest]
    incomplete: list[Any] = []
    errored: list[Any] = []


class _GuidellmBenchmark(BaseModel):
    requests: _GuidellmRequests


class _Vllm(BaseModel):
    """A report of `vllm bench serve` with its lists, in seconds."""

    ttfts: list[Number]
    itls: list[list[Number]]
    duration: Number
    total_output_tokens: Count
    completed: Count
    num_prompts: Count


def read_rounds(config: SpeedConfig) -> SpeedEvidence:
    """All rounds of `config.results`. Raises `SettingsError` for a file that is none of the three."""
    rounds = []
    _check_once([path for one in config.results for path in (*one.base, *one.candidate)])
    for number, one in enumerate(config.results):
        runs = [
            read_run(path, role) for role, paths in (("base", one.base), ("candidate", one.candidate)) for path in paths
        ]
        rounds.append(SpeedRound(number, one.clients, runs, None))
    return SpeedEvidence(rounds, config.metrics, config.slo_ttft_ms, config.slo_e2e_ms)


def _check_once(paths: Sequence[Path]) -> None:
    """`SettingsError` for a run that is given twice: copies would look like rounds without any noise."""
    seen: dict[str, Path] = {}
    for path in filter(Path.is_file, paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest in seen:
            raise SettingsError(f"results {path}: holds the same as {seen[digest]}; expected a run of its own")
        seen[digest] = path


def read_run(path: Path, target: str) -> SpeedRun:
    """One file, as a run of `target` (`base` or `candidate`)."""
    if not path.is_file():
        raise SettingsError(f"results {path}: no such file")
    try:
        run = _aiperf(path, target) if path.suffix == ".jsonl" else _of_json(path, read_json(path), target)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise SettingsError(f"results {path}: {where}: {clip(problem['input'])}: {problem['msg'].lower()}") from None
    except SparseError as error:
        raise SettingsError(f"results {error}") from None
    if not run.ttft_ms:
        raise SettingsError(f"results {path}: no request in it was answered")
    return run


def _of_json(path: Path, value: Mapping[str, Any], target: str) -> SpeedRun:
    if "ttfts" in value:
        return _vllm(path, _Vllm.model_validate(value), target)
    found = value.get("benchmarks")
    if isinstance(found, list):
        if len(found) != 1:
            raise SettingsError(f"{path}: {len(found)} benchmarks of GuideLLM; expected one load in a file")
        return _guidellm(_GuidellmBenchmark.model_validate(found[0]).requests, target)
    hint = "; give profile_export.jsonl beside it, which has single requests" if "request_latency" in value else ""
    raise SettingsError(
        f"{path}: is no benchmarks.json of GuideLLM and no detailed result of vllm bench serve, has {clip(list(value))}"
        f"{hint}"
    )


def _vllm(path: Path, report: _Vllm, target: str) -> SpeedRun:
    if len(report.ttfts) != len(report.itls):
        raise SettingsError(f"{path}: {len(report.ttfts)} first tokens and {len(report.itls)} lists of others")
    return SpeedRun(
        target=target,
        ttft_ms=[1e3 * first for first in report.ttfts],
        itl_ms=[1e3 * gap for request in report.itls for gap in request],
        e2e_ms=[1e3 * (first + sum(gaps)) for first, gaps in zip(report.ttfts, report.itls, strict=True)],
        duration_s=report.duration,
        output_tokens=report.total_output_tokens,
        failed=max(report.num_prompts - report.completed, 0),
    )


def _guidellm(requests: _GuidellmRequests, target: str) -> SpeedRun:
    good = requests.successful
    return SpeedRun(
        target=target,
        ttft_ms=[one.time_to_first_token_ms for one in good],
        itl_ms=[one.inter_token_latency_ms for one in good if one.inter_token_latency_ms is not None],
        e2e_ms=[1e3 * (one.request_end_time - one.request_start_time) for one in good],
        duration_s=_span(good, lambda one: one.request_start_time, lambda one: one.request_end_time),
        output_tokens=sum(one.output_tokens for one in good),
        failed=len(requests.incomplete) + len(requests.errored),
    )


def _aiperf(path: Path, target: str) -> SpeedRun:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise SettingsError(f"{path}: {path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read")
    records = []
    try:
        for line in filter(str.strip, path.read_text("utf-8").splitlines()):
            records.append(_AiperfRecord.model_validate(json.loads(line)))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: is no profile_export.jsonl of AIPerf: {error}") from None
    records = [one for one in records if one.metadata.benchmark_phase == "profiling"]
    good = [one for one in records if one.error is None and not one.metadata.was_cancelled]

    def times(name: str) -> list[list[float]]:
        return [_times(path, name, one) for one in good]

    counted = [one.metrics["output_sequence_length"] for one in good if "output_sequence_length" in one.metrics]
    tokens = [_numbers(_Value.model_validate(one)) for one in counted]
    between = "inter_chunk_latency" if all("inter_chunk_latency" in one.metrics for one in good) else None
    gaps = times(between) if between else [_times(path, "inter_token_latency", one, needed=False) for one in good]
    span_ns = _span(good, lambda one: one.metadata.request_start_ns, lambda one: one.metadata.request_end_ns)
    return SpeedRun(
        target=target,
        ttft_ms=[first for request in times("time_to_first_token") for first in request],
        itl_ms=[gap for request in gaps for gap in request],
        e2e_ms=[whole for request in times("request_latency") for whole in request],
        duration_s=span_ns / 1e9,
        output_tokens=int(sum(count for request in tokens for count in request)),
        failed=len(records) - len(good),
    )


def _times(path: Path, name: str, record: _AiperfRecord, needed: bool = True) -> list[float]:
    """Milliseconds; a request of one token has no time between tokens."""
    found = record.metrics.get(name)
    if found is None:
        if needed:
            raise SettingsError(f"{path}: a request has no {name}; run AIPerf with --streaming")
        return []
    found = _Value.model_validate(found)
    if found.unit not in _MS:
        raise SettingsError(f"{path}: {name}: unit {clip(found.unit)}; expected one of {', '.join(_MS)}")
    return [_MS[found.unit] * number for number in _numbers(found)]


def _numbers(found: _Value) -> list[float]:
    return found.value if isinstance(found.value, list) else [found.value]


def _span(requests: Sequence[Any], start: Callable[[Any], float], end: Callable[[Any], float]) -> float:
    """From the first start to the last end; 0 without requests."""
    return max(map(end, requests), default=0) - min(map(start, requests), default=0)
