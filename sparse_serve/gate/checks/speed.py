"""Speed: is the candidate slower than the base, for what its clients wait for?

A round is four runs under one load, base, candidate, candidate, base, so that a drift of the host touches both alike. A
metric is taken of every run, as a percentile over its requests or tokens; a round gives one ratio, of the two runs of
the candidate to the two of the base. Requests of a round are not independent, so rounds are what is resampled.

The limit is the larger of `max_slowdown` and of `floor_ms` by the base's time: a regression has to be beyond both.

    lower bound >  limit                            fail
    upper bound <= limit, and the interval is fine  pass
    otherwise                                       inconclusive; measure more rounds

Fine is an interval whose upper half is no wider than the limit: a host too noisy to see a regression at the limit
cannot rule it out by luck. A failing metric is tested at `speed_alpha` by the number of metrics, loads and looks, as
rounds are added until decided; a pass is at `speed_pass_alpha`. Rounds in which the host was disturbed
(`host.contamination`) are not used; if more than half were, or too few are left, nothing is concluded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from sparse_serve.gate import wording
from sparse_serve.gate.evidence import Evidence, Limits, SpeedEvidence, SpeedRound, SpeedRun
from sparse_serve.gate.host import contamination
from sparse_serve.gate.statistics import Bounds, ratio_bounds
from sparse_serve.gate.verdict import CheckResult, Verdict

LOOKS = (4, 8, 16, 32, 64)
"""After so many undisturbed rounds the runner asks for a verdict; once more when the time is up."""

MIN_ROUNDS = LOOKS[0]


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Judge every metric under every load."""
    speed = evidence.speed
    if speed is None:
        return []
    loads = list(dict.fromkeys(round.clients for round in speed.rounds))
    if not loads:
        return [CheckResult("speed", Verdict.ERROR, "no round was measured", {})]
    tests = len(loads) * len(speed.metrics) * (len(LOOKS) + 1)
    results = []
    for clients in loads:
        rounds = [round for round in speed.rounds if round.clients == clients]
        results += [_judge(metric, rounds, speed, limits, tests) for metric in speed.metrics]
    return results


def clean_rounds(rounds: Sequence[SpeedRound]) -> int:
    """Rounds in which the host was not disturbed, of the load that has the fewest."""
    loads = {round.clients for round in rounds}
    readings = [[round.host for round in rounds if round.clients == clients] for clients in loads]
    return min(contamination(of_load).count(None) for of_load in readings)


def _judge(metric: str, rounds: Sequence[SpeedRound], speed: SpeedEvidence, limits: Limits, tests: int) -> CheckResult:
    subject = f"{metric}, {rounds[0].clients} client{'s' * (rounds[0].clients != 1)}"
    try:
        measured = [of_round(metric, round, speed) for round in rounds]
    except ValueError as error:
        return CheckResult("speed", Verdict.ERROR, str(error), {}, subject)
    disturbed = contamination([round.host for round in rounds])
    clean = [pair for pair, problem in zip(measured, disturbed, strict=True) if problem is None]
    if len(clean) < MIN_ROUNDS or 2 * len(clean) < len(rounds):
        reasons = [problem for problem in disturbed if problem]
        why = f"the host was disturbed in {len(reasons)} of {len(rounds)} rounds: {reasons[0]}" if reasons else None
        summary = why or f"{len(rounds)} rounds, at least {MIN_ROUNDS} are needed"
        return CheckResult("speed", Verdict.INCONCLUSIVE, summary, {"clean_rounds": float(len(clean))}, subject)
    base = statistics.median(pair[0] for pair in clean)
    candidate = statistics.median(pair[1] for pair in clean)
    is_rate = metric in RATES
    ratios = [pair[0] / pair[1] if is_rate else pair[1] / pair[0] for pair in clean]
    limit = limits.max_slowdown if is_rate else max(limits.max_slowdown, limits.floor_ms / base)
    bounds = ratio_bounds(ratios, limits.speed_alpha / tests, limits.speed_pass_alpha)
    effect = max(bounds.high / bounds.estimate, bounds.estimate / bounds.low) - 1
    unit = RATES.get(metric, "ms")
    unwatched = "" if all(round.host for round in rounds) else "; read from files, nobody watched the host"
    return CheckResult(
        check="speed",
        verdict=decide(bounds, limit),
        summary=f"{candidate:.4g} {unit}, base {base:.4g} {unit}: {say(metric, bounds)} over {len(clean)} rounds, "
        f"{wording.allowed('slowdown', limit)}; these rounds can tell changes from "
        f"{wording.percent(effect, 1)} on{unwatched}",
        numbers={
            "base": base,
            "candidate": candidate,
            "slowdown": bounds.estimate - 1,
            "lower_bound": bounds.low - 1,
            "upper_bound": bounds.high - 1,
            "limit": limit,
            "smallest_effect": effect,
            "clean_rounds": float(len(clean)),
        },
        subject=subject,
    )


def decide(bounds: Bounds, limit: float) -> Verdict:
    """A ratio of times between its bounds, against the slowdown that is allowed."""
    if bounds.low - 1 > limit:
        return Verdict.FAIL
    is_fine = bounds.high / bounds.estimate - 1 <= limit
    return Verdict.PASS if is_fine and bounds.high - 1 <= limit else Verdict.INCONCLUSIVE


def say(metric: str, bounds: Bounds) -> str:
    """A ratio of times between its bounds, for people; of a rate, the time that the same work takes."""
    estimate, low, high = (value - 1 for value in (bounds.estimate, bounds.low, bounds.high))
    what = "time for the same work " if metric in RATES else ""
    return f"{what}{wording.said('slowdown', estimate)}, {wording.between('slowdown', low, high)}"


RATES = {"throughput": "tokens/s", "goodput": "requests/s"}
"""Metrics of which more is better, with their unit. The others are times: `ttft_p50`, `itl_p99`, `e2e_p95` ..."""


def of_round(metric: str, round: SpeedRound, speed: SpeedEvidence) -> tuple[float, float]:
    """Base and candidate: geometric means of their two runs. `ValueError` for runs that cannot be compared."""
    values: dict[str, list[float]] = {"base": [], "candidate": []}
    for one in round.runs:
        if one.failed:
            raise ValueError(f"round {round.number}: {one.failed} requests to the {one.target} failed or stopped early")
        value = metric_of(metric, one, speed)
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"round {round.number}: {metric} of the {one.target} is {value}")
        values[one.target].append(value)
    if not len(values["base"]) == len(values["candidate"]) > 0:
        raise ValueError(f"round {round.number}: expected as many runs of the candidate as of the base")
    return statistics.geometric_mean(values["base"]), statistics.geometric_mean(values["candidate"])


def metric_of(metric: str, run: SpeedRun, speed: SpeedEvidence) -> float:
    """A metric's value in one run: tokens or good requests per second, or a percentile in milliseconds.

    NaN without samples. Half a request is added to the good ones, so that a run without any has a ratio, too.
    """
    if metric == "goodput":
        most = [math.inf if slo is None else slo for slo in (speed.slo_ttft_ms, speed.slo_e2e_ms)]
        good = sum(ttft <= most[0] and e2e <= most[1] for ttft, e2e in zip(run.ttft_ms, run.e2e_ms, strict=True))
        return (good + 0.5) / run.duration_s if run.ttft_ms and run.duration_s > 0 else math.nan
    if metric == "throughput":
        return run.output_tokens / run.duration_s if run.duration_s > 0 else math.nan
    name, _, percentile = metric.partition("_p")
    samples = {"ttft": run.ttft_ms, "itl": run.itl_ms, "e2e": run.e2e_ms}[name]
    return float(np.percentile(np.asarray(samples), float(percentile))) if len(samples) else math.nan
