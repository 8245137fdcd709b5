"""Two reports, measured at different times: the candidate of the later one against the candidate of the earlier one.

What measurements depend on, the environment, is in every report. Where it differs, that is a result of its own,
`inconclusive`, and times are not compared at all.

Quality and tasks are paired as within a report, where both scored the same tokens and the same samples. The rounds of
speed were not run side by side. If both reports have the same base, each round is taken as the ratio of its candidate
to its base, which a slower day of the host leaves alone. If not, times themselves are compared, and only where the
fixed computation of each round (`host`) took as long in both. The bounds are Welch's: the samples are independent.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskgen.core.errors import FormatError, clip
from maskgen.core.perplexity import Perplexity, Protocol
from sparse_serve.gate import wording
from sparse_serve.gate.checks import quality, speed, tasks
from sparse_serve.gate.evidence import (
    Evidence,
    HostReading,
    Limits,
    Scores,
    SpeedEvidence,
    SpeedRound,
    SpeedRun,
    TaskEvidence,
    TextEvidence,
)
from sparse_serve.gate.host import contamination
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.statistics import welch_bounds
from sparse_serve.gate.verdict import CheckResult, Verdict

Stored = Mapping[str, Any]
"""A report as `report_file.load` reads it, or a part of one."""

_ALONE = ("measurement", "parity", "kernels", "memory")
"""Checks whose results need no base."""

_LISTS = ("ttft_ms", "itl_ms", "e2e_ms")


def compare(earlier: Stored, later: Stored) -> GateReport:
    """Judge what both reports measured alike; limits are the later report's. `FormatError` if there is nothing."""
    limits = Limits(**later["limits"])
    evidence = Evidence(list(_texts(earlier, later)), tasks=list(_tasks(earlier, later)))
    environment = _environment(earlier["environment"], later["environment"])
    timed = list(_speed(earlier, later, limits, environment.verdict is Verdict.PASS))
    if not (evidence.texts or evidence.tasks or timed):
        raise FormatError("the two reports have nothing in common; measure the same texts, tasks or loads in both")
    judged = [*quality.run(evidence, limits), *tasks.run(evidence, limits), *timed]
    results = [environment, *_left_out(earlier, later), *judged, *_own(later)]
    provenance = {
        "base": earlier["provenance"].get("candidate"),
        "candidate": later["provenance"].get("candidate"),
        "base_created": earlier["provenance"].get("created"),
        "candidate_created": later["provenance"].get("created"),
    }
    return GateReport(results, evidence, limits, provenance, dict(later["environment"]))


def _environment(earlier: Mapping[str, str], later: Mapping[str, str]) -> CheckResult:
    names = sorted(earlier.keys() | later.keys())
    differing = [name for name in names if earlier.get(name) != later.get(name)]
    if not differing:
        summary = f"both were measured alike: {', '.join(names)}"
        return CheckResult("environment", Verdict.PASS, summary, {"differing": 0.0})
    said = "; ".join(f"{name} {clip(earlier.get(name))}, then {clip(later.get(name))}" for name in differing)
    summary = f"the two were not measured alike: {said}"
    return CheckResult("environment", Verdict.INCONCLUSIVE, summary, {"differing": float(len(differing))})


def _left_out(earlier: Stored, later: Stored) -> Iterator[CheckResult]:
    """What only one of the reports has: not compared, so not known to be within its limit."""
    before, after = _measured(earlier), _measured(later)
    missing = {"earlier": after.keys() - before.keys(), "later": before.keys() - after.keys()}
    names = {**before, **after}
    said = [
        f"not in the {which} report: {', '.join(sorted(names[key] for key in keys))}"
        for which, keys in missing.items()
        if keys
    ]
    if said:
        numbers = {f"not_in_{which}": float(len(keys)) for which, keys in missing.items()}
        yield CheckResult("coverage", Verdict.INCONCLUSIVE, "; ".join(said), numbers)


def _measured(stored: Stored) -> dict[tuple[Any, ...], str]:
    """What a report measured, with its name: texts, tasks by their samples, metrics under their loads."""
    found, speed_of = stored["evidence"], _speed_of(stored["evidence"]["speed"])
    named: dict[tuple[Any, ...], str] = {("text", text["text"]): text["text"] for text in found["texts"]}
    for task in found["tasks"]:
        named["task", task["task"], task["samples_digest"]] = (
            f"{task['task']} with these {len(task['candidate'])} samples"
        )
    if speed_of is not None:
        for load in _loads(speed_of):
            named |= {(metric, *load): f"{metric} under {_load(load)}" for metric in speed_of.metrics}
    return named


def _load(load: tuple[int, ...]) -> str:
    clients, requests, input_tokens, output_tokens = load
    return f"clients: {clients}, requests: {requests}, tokens: {input_tokens} in and {output_tokens} out"


def _own(later: Stored) -> Iterator[CheckResult]:
    """What the later report says of a model alone, without another: it holds in a comparison, too."""
    return (result for result in map(CheckResult.of, later["results"]) if result.check in _ALONE)


def _texts(earlier: Stored, later: Stored) -> Iterator[TextEvidence]:
    before = {text["text"]: text["candidate"] for text in earlier["evidence"]["texts"]}
    for text in later["evidence"]["texts"]:
        if text["text"] in before:
            yield TextEvidence(text["text"], _scores(before[text["text"]]), _scores(text["candidate"]))


def _scores(stored: Stored) -> Scores:
    def perplexity(value: Stored) -> Perplexity:
        nll = [math.nan if number is None else number for number in value["nll_per_window"]]
        return Perplexity(Protocol(**value["protocol"]), nll, value["scored_tokens_per_window"], value["tokens_digest"])

    offline = stored["offline"]
    return Scores(perplexity(stored["served"]), None if offline is None else perplexity(offline))


def _tasks(earlier: Stored, later: Stored) -> Iterator[TaskEvidence]:
    before = {(task["task"], task["samples_digest"]): task["candidate"] for task in earlier["evidence"]["tasks"]}
    for task in later["evidence"]["tasks"]:
        answers = before.get((task["task"], task["samples_digest"]))
        if answers is not None:
            yield TaskEvidence(task["task"], answers, task["candidate"], task["samples_digest"])


@dataclass(frozen=True)
class _Timed:
    """Clean rounds of one load: a metric of base and candidate in each, and the time of the fixed computation."""

    pairs: Sequence[tuple[float, float]]
    probe_s: float


def _speed(earlier: Stored, later: Stored, limits: Limits, is_alike: bool) -> Iterator[CheckResult]:
    before, after = (_speed_of(report["evidence"]["speed"]) for report in (earlier, later))
    if before is None or after is None:
        return
    loads = [load for load in _loads(after) if load in _loads(before)]
    metrics = [metric for metric in after.metrics if metric in before.metrics]
    tests = len(loads) * len(metrics)
    for load in loads:
        for metric in metrics:
            subject = f"{metric}, {load[0]} client{'s' * (load[0] != 1)}"
            try:
                timed = [_timed(metric, load[0], found) for found in (before, after)]
            except ValueError as error:
                yield CheckResult("speed", Verdict.ERROR, str(error), {}, subject)
                continue
            yield _judge(subject, metric, timed, _same_base(earlier, later), is_alike, limits, tests)


def _judge(
    subject: str, metric: str, timed: Sequence[_Timed], has_base: bool, is_alike: bool, limits: Limits, tests: int
) -> CheckResult:
    def undecided(why: str) -> CheckResult:
        return CheckResult("speed", Verdict.INCONCLUSIVE, why, {}, subject)

    fewest = min(len(one.pairs) for one in timed)
    if fewest < speed.MIN_ROUNDS:
        return undecided(f"{fewest} rounds without disturbance in one of the reports; {speed.MIN_ROUNDS} are needed")
    if not is_alike:
        return undecided("times were measured in other surroundings, and say nothing")
    is_rate = metric in speed.RATES
    values = [[candidate / base if has_base else candidate for base, candidate in one.pairs] for one in timed]
    if is_rate:
        values = [[1 / value for value in part] for part in values]
    bounds = welch_bounds(values[0], values[1], limits.speed_alpha / tests, limits.speed_pass_alpha)
    usual = statistics.median(candidate for _, candidate in timed[0].pairs)
    limit = limits.max_slowdown if is_rate else max(limits.max_slowdown, limits.floor_ms / usual)
    drift = timed[1].probe_s / timed[0].probe_s - 1
    if not has_base and math.isnan(drift):
        return undecided("the reports have no base in common, and nobody watched the host in one of them")
    if not has_base and abs(drift) > limit / 2:
        took = wording.said("slowdown", drift)
        return undecided(f"the reports have no base in common, and the time of a fixed computation was {took}")
    how = "as ratios to the base of both" if has_base else "not measured side by side"
    return CheckResult(
        check="speed",
        verdict=speed.decide(bounds, limit),
        summary=f"against the earlier report: {speed.say(metric, bounds)} over {len(values[0])} and {len(values[1])} "
        f"rounds, {how}, {wording.allowed('slowdown', limit)}",
        numbers={
            "slowdown": bounds.estimate - 1,
            "lower_bound": bounds.low - 1,
            "upper_bound": bounds.high - 1,
            "limit": limit,
            "probe_drift": drift,
        },
        subject=subject,
    )


def _same_base(earlier: Stored, later: Stored) -> bool:
    """Whether both compared with the same weights; those of a server that somebody else started are not known."""
    kinds = ("base_digest", "base_mask_digest", "base_recipe_digest")
    found = [[report["provenance"].get(kind) for kind in kinds] for report in (earlier, later)]
    return found[0] == found[1] and any(found[0])


def _loads(found: SpeedEvidence) -> list[tuple[int, ...]]:
    clients = dict.fromkeys(round.clients for round in found.rounds)
    return [(number, found.requests, found.input_tokens, found.output_tokens) for number in clients]


def _timed(metric: str, clients: int, found: SpeedEvidence) -> _Timed:
    rounds = [round for round in found.rounds if round.clients == clients]
    measured = [speed.of_round(metric, round, found) for round in rounds]  # a failed request counts in any round
    quiet = [problem is None for problem in contamination([round.host for round in rounds])]
    clean = list(itertools.compress(rounds, quiet))
    probes = [min(round.host.probe_s) for round in clean if round.host is not None] or [math.nan]
    return _Timed(list(itertools.compress(measured, quiet)), statistics.median(probes))


def _host(stored: Stored | None) -> HostReading | None:
    return None if stored is None else HostReading(**stored)


def _speed_of(stored: Stored | None) -> SpeedEvidence | None:
    if stored is None:
        return None

    def run(value: Stored) -> SpeedRun:
        lists = {name: [math.nan if one is None else one for one in value[name]] for name in _LISTS}
        return SpeedRun(**{**value, **lists})

    rounds = [
        SpeedRound(one["number"], one["clients"], [run(each) for each in one["runs"]], _host(one["host"]))
        for one in stored["rounds"]
    ]
    return SpeedEvidence(**{**stored, "rounds": rounds})
