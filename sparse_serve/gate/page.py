"""A report as one HTML page with its plots inside, for people: nothing is loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined

from sparse_serve.gate import explain, terms, wording
from sparse_serve.gate.checks import speed
from sparse_serve.gate.evidence import SpeedEvidence, SpeedRound
from sparse_serve.gate.host import contamination
from sparse_serve.gate.report import GateReport, megabytes
from sparse_serve.gate.verdict import CheckResult, worst_first
from sparse_serve.tuning.parity_file import KernelParity


@dataclass(frozen=True)
class Interval:
    """An estimate between its bounds beside its limit: positions in per cent of the plot's width, and labels."""

    low: float
    high: float
    estimate: float
    limit: float
    estimate_text: str
    limit_text: str


@dataclass(frozen=True)
class Dot:
    """A point of a plot, in its units, and what is said of it. `is_odd`: not used, or no number."""

    x: float
    y: float
    text: str
    is_odd: bool = False


@dataclass(frozen=True)
class Plot:
    """Dots over a horizontal zero line, in a box of 640 by 160."""

    title: str
    explanation: str
    dots: Sequence[Dot]
    zero: float
    top: str
    bottom: str


def page(report: GateReport) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("sparse_serve.gate") / "page.html").read_text("utf-8"))
    return template.render(
        verdict=report.verdict.value,
        headline=explain.headline(report.verdict),
        base=report.provenance.get("base", "?"),
        candidate=report.provenance.get("candidate", "?"),
        counts=_counts(report),
        alike=_alike(report),
        causes=[(terms.title(result), result.summary) for result in explain.causes(report.results)],
        words=terms.words(result.check for result in report.results),
        rows=[
            (
                result,
                terms.title(result),
                explain.MEANING.get(result.check, ""),
                explain.next_step(result.check, result.verdict),
                _interval(result),
            )
            for result in worst_first(report.results)
        ],
        kernels=_kernel_rows(report),
        memory=[
            (role, megabytes(one.weight_bytes), megabytes(one.peak_rss_bytes), one.processes, megabytes(one.gpu_bytes))
            for role, one in report.evidence.memory.items()
        ],
        plots=[*_text_plots(report), *_speed_plots(report)],
        facts=list(terms.facts({**report.provenance, **report.environment})),
    )


def _counts(report: GateReport) -> str:
    """How many results have each verdict, the worst first."""
    verdicts = [result.verdict for result in worst_first(report.results)]
    found = (f"{verdicts.count(verdict)} {verdict.value}" for verdict in dict.fromkeys(verdicts))
    return ", ".join(found) or "there is none"


def _alike(report: GateReport) -> str:
    """What both targets were measured on."""
    found = report.evidence
    parts = {"on the same text": found.texts, "on the same samples": found.tasks, "under the same load": found.speed}
    measured = [what for what, of in parts.items() if of]
    return " and ".join([", ".join(measured[:-1]), measured[-1]] if measured[1:] else measured)


@dataclass(frozen=True)
class KernelRow:
    """The layers in which a kernel serves a bucket of tokens, and the worst of them, as text."""

    target: str
    kernel: str
    tokens: str
    layers: int
    worst: str
    is_wrong: bool


def _kernel_rows(report: GateReport) -> list[KernelRow]:
    groups: dict[tuple[str, str, int], list[KernelParity]] = {}
    for role, found in report.evidence.kernels.items():
        for one in found:
            groups.setdefault((role, one.kernel, one.tokens), []).append(one)
    rows = []
    for (role, kernel, _), group in sorted(groups.items()):
        worst = max(group, key=lambda one: one.ratio)
        text = f"{worst.ratio:.3g} ({worst.place})"
        layers = len({one.layer for one in group})
        rows.append(KernelRow(role, kernel, worst.bucket, layers, text, not worst.ratio <= 1))
    return rows


def _interval(result: CheckResult) -> Interval | None:
    """What to draw of a result; None where there are no bounds or no limit."""
    numbers = result.numbers
    name = next((name for name in wording.QUANTITIES if name in numbers), None)
    if name is None or "limit" not in numbers or "upper_bound" not in numbers:
        return None
    estimate, high, limit = numbers[name], numbers["upper_bound"], numbers["limit"]
    low = numbers.get("lower_bound", estimate)
    if not all(map(math.isfinite, (estimate, low, high, limit))):
        return None
    left, right = min(low, limit, 0.0), max(high, limit, 0.0)
    margin = 0.08 * (right - left) or 1.0
    left, right = left - margin, right + margin

    def place(value: float) -> float:
        return round(100 * (value - left) / (right - left), 2)

    said = wording.said(name, estimate), wording.allowed(name, limit)
    return Interval(place(low), place(high), place(estimate), place(limit), *said)


def _text_plots(report: GateReport) -> Iterator[Plot]:
    for text in report.evidence.texts:
        pairs = zip(text.base.served.nll_per_window, text.candidate.served.nll_per_window, strict=False)
        values = [candidate - base for base, candidate in pairs]
        labels = [f"window {at + 1}: {_nats(value)}" for at, value in enumerate(values)]
        yield _plot(
            f"{text.text}: what the candidate loses, window by window",
            "Each dot is a piece of the text. Above the line the base predicts it better, below it the candidate.",
            values,
            labels,
            [False] * len(values),
            _nats,
        )


def _nats(value: float) -> str:
    more = "more" if value > 0 else "less"
    return f"{abs(value):.3g} nats per token {more}" if value else "as well predicted"


def _speed_plots(report: GateReport) -> Iterator[Plot]:
    measured = report.evidence.speed
    if measured is None:
        return
    for clients in dict.fromkeys(round.clients for round in measured.rounds):
        rounds = [round for round in measured.rounds if round.clients == clients]
        problems = contamination([round.host for round in rounds])
        for metric in measured.metrics:
            values = [_slowdown(metric, round, measured) for round in rounds]
            labels = [
                f"round {round.number + 1}: {wording.said('slowdown', value)}"
                + (f", not used: {problem}" if problem else "")
                for round, value, problem in zip(rounds, values, problems, strict=True)
            ]
            yield _plot(
                f"{terms.metric(metric)}, clients: {clients}: candidate against base, round by round",
                "Above the line the candidate is slower, below it faster. Hollow dots were measured while the machine "
                "was busy with other things, and not used.",
                values,
                labels,
                [problem is not None for problem in problems],
                lambda value: wording.said("slowdown", value) if value else "as fast",
            )


def _slowdown(metric: str, round: SpeedRound, measured: SpeedEvidence) -> float:
    try:
        base, candidate = speed.of_round(metric, round, measured)
    except ValueError:
        return math.nan
    return (base / candidate if metric in speed.RATES else candidate / base) - 1


def _plot(
    title: str,
    explanation: str,
    values: Sequence[float],
    labels: Sequence[str],
    odd: Sequence[bool],
    show: Callable[[float], str],
) -> Plot:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    span = high - low or 1.0

    def y(value: float) -> float:
        return round(140 - 120 * (value - low) / span, 1)

    step = 620 / max(len(values), 1)
    dots = [
        Dot(round(10 + step * (at + 0.5), 1), y(value) if math.isfinite(value) else y(0.0), label, is_odd)
        for at, (value, label, is_odd) in enumerate(zip(values, labels, odd, strict=True))
    ]
    return Plot(title, explanation, dots, y(0.0), show(high), show(low))
