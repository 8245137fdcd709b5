"""The frontier as Markdown and as a plot, from result files. See `tests.bench.frontier`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, dict[str, Any]]
"""Of every point, by its name."""


class Load(NamedTuple):
    """So many clients at a time; of a sparse model, whether its activations are rounded to int8."""

    clients: int
    rounds_activations: bool

    @property
    def title(self) -> str:
        """For the head of a column."""
        clients = f"{self.clients} client{'s' if self.clients > 1 else ''}"
        return clients + (", int8 activations" if self.rounds_activations else "")


Speeds = Mapping[str, Mapping[Load, float]]
"""How many times faster than the dense model a point decodes: the median over rounds. Only of what was served."""

DENSE_SERVER = "vLLM bf16"
"""The server of the dense model in a run with all (`sparse_serve.bench.peers`)."""

_ROUNDED = "rounded"
_FAMILIES = {
    "dense": ("#222222", "*"),
    "peer": ("#1f77b4", "s"),
    "sparse": ("#d95f02", "o"),
    _ROUNDED: ("#7570b3", "D"),
}
_TITLES = {
    "dense": "dense, 16 bits",
    "peer": "dense, integer weights",
    "sparse": "2:4",
    _ROUNDED: "2:4, served with int8 activations",
}


@dataclass(frozen=True)
class Point:
    """One model: its bytes as shares of the dense model's, and its quality as means over texts.

    `linear` counts the linear layers of the blocks, `total` everything. `ratio` is its perplexity by the dense model's,
    a geometric mean.
    """

    name: str
    family: str
    linear: float
    total: float
    ratio: float
    kl: float
    agreement: float


def points(results: Results) -> list[Point]:
    """In the order given. The dense model, which has a KL divergence of 0, has to be among them."""
    (dense,) = (result for result in results.values() if _family(result) == "dense")
    return [
        Point(
            name,
            _family(result),
            result["linear_bytes"] / result["dense_linear_bytes"],
            result["total_bytes"] / result["dense_total_bytes"],
            statistics.geometric_mean(result["perplexity"][text] / dense["perplexity"][text] for text in result["kl"]),
            statistics.mean(result["kl"].values()),
            statistics.mean(result["agreement"].values()),
        )
        for name, result in results.items()
    ]


def _family(result: Mapping[str, Any]) -> str:
    if "peer" in result:
        return "peer"
    return "dense" if all(value == 0 for value in result["kl"].values()) else "sparse"


def is_best(point: Point, among: Sequence[Point]) -> bool:
    """Whether none of the others has fewer bytes and a KL divergence that is no higher, or as many and a lower one."""
    return not any(
        (other.linear < point.linear and other.kl <= point.kl) or (other.linear <= point.linear and other.kl < point.kl)
        for other in among
    )


def speeds(result: Mapping[str, Any]) -> Speeds:
    """Of every point, from the record of a run in which all were served (`tests.bench.frontier`)."""
    per_round: dict[tuple[str, Load], dict[int, float]] = {}
    for turn in result["served"]["turns"]:
        load = Load(turn["load"]["clients"], "int8 activations" in turn["name"])
        per_round.setdefault((turn["name"], load), {})[turn["round"]] = 1 / turn["tpot_ms"]
    found: dict[str, dict[Load, float]] = {}
    for (server, load), mine in per_round.items():
        theirs = per_round[DENSE_SERVER, Load(load.clients, False)]
        for name in result["points_of"][server]:
            found.setdefault(name, {})[load] = _faster(mine, theirs)
    return found


def _faster(mine: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """The median over the rounds that both were in."""
    return statistics.median(mine[number] / theirs[number] for number in mine.keys() & theirs.keys())


def markdown(results: Results, speeds: Speeds) -> str:
    """One line a point, from the most bytes to the fewest. A point that no other one beats in bytes and KL is bold."""
    if not results:
        return "nothing has been measured yet"
    texts, loads = list(next(iter(results.values()))["perplexity"]), _loads(speeds)
    headings = ["point", "bytes, linear layers", "bytes, model", *texts, "KL", "top-1"]
    headings += [f"decode, {load.title}" for load in loads]
    lines = [f"| {' | '.join(headings)} |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    found = points(results)
    for point in sorted(found, key=lambda point: -point.linear):
        name = f"**{point.name}**" if is_best(point, found) else point.name
        cells = [name, f"{point.linear:.3f}", f"{point.total:.3f}"]
        cells += [f"{results[point.name]['perplexity'][text]:.1f}" for text in texts]
        cells += [f"{point.kl:.4f}", f"{point.agreement:.1%}"]
        mine = speeds.get(point.name, {})
        cells += [f"{mine[load]:.2f}x" if load in mine else "" for load in loads]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _loads(speeds: Speeds) -> list[Load]:
    return sorted({load for loads in speeds.values() for load in loads})


def plot(results: Results, speeds: Speeds, path: Path) -> None:
    """Perplexity, KL divergence and agreement against bytes; and against decoding speed, where that was measured."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = points(results)
    numbers = {point.name: number for number, point in enumerate(sorted(found, key=lambda one: -one.linear), 1)}
    clients = sorted({load.clients for load in _loads(speeds)})
    with rc_context({"svg.hashsalt": "frontier", "font.size": 9}):
        figure = Figure(figsize=(13.5, 4.4 * (1 + len(clients)) + 0.3), layout="constrained")
        grid = figure.subplots(1 + len(clients), 3, squeeze=False, sharex="row")
        _row(grid[0], found, numbers, lambda point: point.linear, "bytes of the linear layers, by those of dense")
        for axes, number in zip(grid[1:], clients, strict=True):
            faster = _served(found, speeds, number)
            label = f"decoding speed by that of dense, {Load(number, False).title}"
            _row(axes, list(faster), numbers, faster.__getitem__, label)
        lines, names = grid[-1][0].get_legend_handles_labels()
        listed = "    ".join(f"{number} {name}" for name, number in numbers.items())
        figure.legend(lines, names, loc="outside upper center", ncols=len(names), frameon=False)
        figure.supxlabel(_wrapped(listed), fontsize=9, ha="left", x=0.02)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _served(found: Sequence[Point], speeds: Speeds, clients: int) -> dict[Point, float]:
    """Speeds under the loads of so many clients; a point that rounds activations is one of another family."""
    return {
        replace(point, family=_ROUNDED) if load.rounds_activations else point: speed
        for point in found
        for load, speed in speeds.get(point.name, {}).items()
        if load.clients == clients
    }


def _wrapped(text: str, width: int = 150) -> str:
    """Entries, four spaces apart, in lines of about `width` characters."""
    lines = [""]
    for entry in text.split("    "):
        if len(lines[-1]) + len(entry) > width:
            lines.append("")
        lines[-1] += ("    " if lines[-1] else "") + entry
    return "\n".join(lines)


def _row(
    row: Sequence[Axes],
    found: Sequence[Point],
    numbers: Mapping[str, int],
    across: Callable[[Point], float],
    label: str,
) -> None:
    """Three panels. KL divergence has a logarithmic axis, on which dense, with none, is not."""
    _panel(row[0], found, numbers, across, lambda point: point.ratio, "perplexity by that of dense (1: as good)")
    _panel(row[1], found, numbers, across, lambda point: point.kl, "KL divergence from dense, nats per token")
    _panel(row[2], found, numbers, across, lambda point: 100 * point.agreement, "top-1 agreement with dense, %")
    for axes in row:
        axes.set_xlabel(label)


def _panel(
    axes: Axes,
    found: Sequence[Point],
    numbers: Mapping[str, int],
    across: Callable[[Point], float],
    up: Callable[[Point], float],
    title: str,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_title(title, loc="left", fontsize=9.5)
    is_log = "agreement" not in title
    for family, (colour, marker) in _FAMILIES.items():
        if not any(point.family == family for point in found):
            continue
        mine = [point for point in found if point.family == family and (up(point) > 0 or not is_log)]
        xs, ys = [across(point) for point in mine], [up(point) for point in mine]
        axes.plot(xs, ys, marker, color=colour, markersize=8, alpha=0.85, label=_TITLES[family], markeredgewidth=0)
        for point, x, y in zip(mine, xs, ys, strict=True):
            axes.annotate(
                str(numbers[point.name]), (x, y), xytext=(5, 4), textcoords="offset points", color=colour, fontsize=9
            )
    axes.set_xscale("log")
    axes.set_yscale("log" if is_log else "linear")
    axes.margins(0.12, 0.12)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis) if is_log else (axes.xaxis,):
        low, high = axis.get_view_interval()
        steps = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)
        axis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, linewidth=0.4, alpha=0.6)
    if not is_log:
        axes.set_ylim(top=min(102.0, math.ceil(axes.get_ylim()[1])))
