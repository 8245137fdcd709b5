"""Curves of training runs as inline SVG, drawn by matplotlib.

Text stays text and colours are CSS variables, so that the page's theme reaches into the drawings: matplotlib is given
colours that stand for a variable each, and they are put in afterwards. No string of a log gets in here, runs are told
apart by colour and marker, and the page says which is which.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from maskgen.train.report.runs import Run

Points = Sequence[tuple[int, float]]

MARKERS = "osD^vPX*"
"""One per run, in turn, like the colours."""

GLYPHS = "●■◆▲▼✚✖★"
"""The same for the page's text."""

MOST_POINTS = 120
"""A longer curve is drawn as means of as many equal parts, with their extremes behind it."""

MOST_BANDS = 3
"""Runs whose extremes can be told apart in one picture."""

_DRAWABLE = 1e30
"""Beyond it axes overflow."""

_LOG_SCALE_RATIO = 30.0

_INK, _FAINT = "#010101", "#010102"
_VARIABLES = {
    _INK: "var(--muted)",
    _FAINT: "var(--line)",
    **{f"#0102{n:02x}": f"var(--run{n})" for n in range(len(MARKERS))},
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "maskgen",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.formatter.limits": (-4, 7),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Curve:
    """One picture: what it shows, in which unit, and where a run has it. `log` allows a logarithmic axis."""

    title: str
    unit: str
    note: str
    points: Callable[[Run], Points]
    log: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Drawing:
    """`svg` is an element to put in a page; it holds nothing that came from a log but numbers."""

    title: str
    note: str
    svg: str


def _of_steps(field: str, scale: float = 1.0) -> Callable[[Run], Points]:
    return lambda run: [(step.step, getattr(step, field) * scale) for step in run.steps]


def _of_evals(field: str, scale: float = 1.0, first: int = 0) -> Callable[[Run], Points]:
    return lambda run: [(look.step, getattr(look, field) * scale) for look in run.evals if look.step >= first]


def _divergence(run: Run) -> Points:
    """Nothing for runs without a teacher, which log zeros."""
    return _of_steps("divergence")(run) if any(step.divergence for step in run.steps) else []


CURVES = (
    Curve(
        "Held-out perplexity",
        "perplexity",
        "with hard masks, as it would be exported; dashed: dense",
        _of_evals("perplexity"),
        True,
        True,
    ),
    Curve("Loss", "loss", "what is minimised, penalties included; its scale differs by method", _of_steps("loss")),
    Curve("Cross-entropy", "nats per token", "of the relaxed model on training text", _of_steps("cross_entropy")),
    Curve("KL to the dense model", "nats per token", "T² KL, for runs that distil", _divergence, True),
    Curve("Agreement", "% of the mask", "entries as they were at the start", _of_evals("agreement", 100)),
    Curve("Flip rate", "% of the mask", "entries changed since the look before", _of_evals("flipped", 100, 1)),
    Curve("Gradient norm", "norm", "before it is clipped", _of_steps("gradient_norm"), True),
    Curve("Learning rate", "rate", "of the recipe's schedule", _of_steps("lr")),
    Curve("Speed", "tokens/s", "trained on; evaluations not counted", lambda run: list(run.tokens_per_s())),
)


def curves(runs: Sequence[Run]) -> list[Drawing]:
    """Every picture for which some run has something to show."""
    drawings = []
    for curve in CURVES:
        points = [curve.points(run) for run in runs]
        if any(points):
            dense = [run.dense_perplexity if curve.dense else None for run in runs]
            drawings.append(Drawing(curve.title, curve.note, _draw(curve, points, dense)))
    return drawings


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, largest) of at most `most` equal parts of a curve."""
    bounds = [round(part * len(points) / most) for part in range(most + 1)]
    parts = [points[low:high] for low, high in pairwise(bounds) if high > low]
    return [_summary([step for step, _ in part], [_drawable(value) for _, value in part]) for part in parts]


def _summary(steps: list[int], values: list[float]) -> tuple[float, float, float, float]:
    return sum(steps) / len(steps), sum(values) / len(values), min(values), max(values)


def _drawable(value: float) -> float:
    return max(-_DRAWABLE, min(_DRAWABLE, value))


def _draw(curve: Curve, points: Sequence[Points], dense: Sequence[float | None]) -> str:
    """Lines of every run that has some, on one pair of axes."""
    with context(["default", _STYLE]):
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        banded = len(points) <= MOST_BANDS
        for number, line in enumerate(points):
            _line(axes, number, line, banded)
        shown = {_drawable(value) for value, line in zip(dense, points, strict=True) if value is not None and line}
        for value in shown:
            axes.axhline(value, color=_INK, linestyle="--", linewidth=1.2)
        values = [_drawable(value) for line in points for _, value in line] + sorted(shown)
        if curve.log and min(values) > 0 and max(values) > _LOG_SCALE_RATIO * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(curve.unit)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), curve, points)


def _line(axes: Axes, number: int, points: Points, banded: bool) -> None:
    if not points:
        return
    colour, marker = f"#0102{number % len(MARKERS):02x}", MARKERS[number % len(MARKERS)]
    steps, means, least, largest = zip(*thinned(points), strict=True)
    if banded and len(points) > len(steps):
        axes.fill_between(steps, least, largest, color=colour, alpha=0.16, linewidth=0)
    every = None if len(steps) <= 20 else (number % len(MARKERS) * len(steps) // 40, len(steps) // 5)
    axes.plot(steps, means, color=colour, marker=marker, markersize=4.5, markevery=every, linewidth=1.3)


def _inline(document: str, curve: Curve, points: Sequence[Points]) -> str:
    """The element of an SVG document, fit for a page: named, described, themed, its ids its own."""
    prefix = re.sub(r"[^a-z]+", "-", curve.title.lower())
    svg = document[document.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| font-family: [^;]*;", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="', f' id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub(r"#0[0-9a-f]{5}", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    described = "; ".join(_describe(number, line) for number, line in enumerate(points, 1) if line)
    head = f'<svg role="img" aria-labelledby="{prefix}-title {prefix}-desc" '
    names = f'<title id="{prefix}-title">{curve.title}</title><desc id="{prefix}-desc">{described}</desc>'
    opening, rest = svg.removeprefix("<svg ").split(">", 1)
    opening = re.sub(r'\b(width|height)="[^"]*" ?', "", opening)
    return f"{head}{opening}>{names}{rest}"


def _describe(number: int, points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"run {number}: {start:.4g} at step {first}, {end:.4g} at step {last}"
