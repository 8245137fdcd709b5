"""A roofline drawn by matplotlib: what the machine allows, and how near each layer comes.

Left to right, operations per byte of weight; upwards, operations per second. Below the slope a layer waits for memory,
below the flat part for arithmetic. Operations are those of the dense layer whatever is skipped, so that twice as high
is twice as fast; the same number of tokens lies further right for a sparse layer, which reads fewer bytes.

matplotlib is an optional extra, so it is imported where something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_serve.runtime.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png", ".pdf")

_MARKERS = "osD^vPX*"
_COLOURS = ("#8a8f98", "#4b5563", "#d1495b", "#edae49", "#00798c", "#8e5ea2", "#5b8c5a", "#30638e")
_INK, _ROOF, _UNDER_THE_ROOF = "#6b7280", "#b7bcc5", "#f7f8fa"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparse-serve",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _ROOF,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e9ebee",
}


@dataclass(frozen=True)
class Point:
    """One candidate at one number of tokens: dense-equivalent operations per byte of weight, and per second."""

    candidate: str
    tokens: int
    operations_per_byte: float
    operations_per_s: float


@dataclass(frozen=True)
class Panel:
    """One layer: a title, and its points in order of candidate and tokens."""

    title: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Roof:
    """What the machine can: bytes read per second (None if not measured) and operations per second."""

    bytes_per_s: float | None
    operations_per_s: float


def check(file: Path) -> None:
    """Raise `SettingsError` if nothing could be drawn to `file`, before minutes are spent on what to draw."""
    if file.suffix not in FORMATS:
        raise SettingsError(f"--plot {file}: expected a name that ends in one of {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise SettingsError("--plot needs matplotlib, which is not installed: pip install 'sparse-serve[report]'")


def roofline(panels: Sequence[Panel], roof: Roof, title: str, file: Path) -> None:
    """Draw one panel per layer, axes shared, to `file`, whose suffix is one of `FORMATS`."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    candidates = list(dict.fromkeys(point.candidate for panel in panels for point in panel.points))
    with context(["default", _STYLE]):
        figure = Figure(figsize=(1.2 + 4.6 * len(panels), 5.0), layout="constrained")
        row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            _frame(axes, panel.title)
            for number, candidate in enumerate(candidates):
                _line(axes, number, candidate, [point for point in panel.points if point.candidate == candidate])
            _label_tokens(axes, panel.points)
        for axes in row:  # the limits are final only now, as panels share them
            _draw_roof(axes, roof)
        row[0].set_ylabel("GFLOP/s, counted as dense (numbers: tokens)")
        figure.suptitle(title, fontsize=11)
        lines, names = row[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=5 if len(panels) > 1 else 2, frameon=False)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _frame(axes: Axes, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.06, 0.09)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("operations per byte of weight, counted as dense")


def _line(axes: Axes, number: int, candidate: str, points: Sequence[Point]) -> None:
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    across = [point.operations_per_byte for point in points]
    up = [point.operations_per_s / 1e9 for point in points]
    axes.plot(across, up, color=colour, marker=marker, markersize=5.5, linewidth=0.9, label=candidate)


def _label_tokens(axes: Axes, points: Sequence[Point]) -> None:
    """Numbers of tokens at two lines, above the highest and below the lowest; the others' markers go the same way."""
    candidates = dict.fromkeys(point.candidate for point in points)
    height = {name: max(point.operations_per_s for point in points if point.candidate == name) for name in candidates}
    top, bottom = max(candidates, key=height.__getitem__), min(candidates, key=height.__getitem__)
    for point in points:
        if point.candidate in (top, bottom):
            beside, side = (1.08, "bottom") if point.candidate == top else (1 / 1.08, "top")
            x, y = point.operations_per_byte, beside * point.operations_per_s / 1e9
            axes.text(x, y, str(point.tokens), ha="center", va=side, size=8, color=_INK)


def _draw_roof(axes: Axes, roof: Roof) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    peak = roof.operations_per_s / 1e9
    across, up, label = [left, right], [peak, peak], f"fastest dense: {peak:.3g} GFLOP/s"
    if roof.bytes_per_s is not None:
        slope = roof.bytes_per_s / 1e9
        start, ridge = max(left, bottom / slope), peak / slope
        right = max(right, 2 * ridge)
        across, up, label = [start, ridge, right], [start * slope, peak, peak], f"memory: {slope:.3g} GB/s, {label}"
    axes.plot(across, up, color=_ROOF, linewidth=2, zorder=1, label=label)
    axes.fill_between(across, up, bottom, color=_UNDER_THE_ROOF, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, max(top, 1.4 * peak))
