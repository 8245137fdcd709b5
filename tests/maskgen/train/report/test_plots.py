"""The curves: what is drawn is what was logged, whatever was logged, and fits into a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskgen.train.report.plots import CURVES, GLYPHS, MARKERS, curves, thinned
from maskgen.train.report.runs import load
from tests.maskgen import logs

SVG = "{http://www.w3.org/2000/svg}"
values = st.floats(-1e30, 1e30)


@given(st.lists(values, max_size=400), st.integers(1, 50))
def test_thinning_keeps_extremes_and_means(ys: list[float], most: int) -> None:
    points = list(enumerate(ys, 1))
    parts = thinned(points, most)
    assert len(parts) == min(len(points), most)
    if not ys:
        return
    assert min(low for _, _, low, _ in parts) == min(ys) and max(high for _, _, _, high in parts) == max(ys)
    slack = 1e-9 * max(map(abs, ys))
    assert all(low - slack <= mean <= high + slack for _, mean, low, high in parts)
    if len(points) <= most:
        assert parts == [(x, y, y, y) for x, y in points]


def test_every_curve_of_a_whole_run(tmp_path: Path) -> None:
    drawings = curves([load(logs.write(tmp_path / "log"))])
    assert [drawing.title for drawing in drawings] == [curve.title for curve in CURVES]
    ids: list[str] = []
    for drawing in drawings:
        root = ET.fromstring(drawing.svg)
        assert root.get("role") == "img" and root.get("viewBox") and not root.get("width")
        named = {element.get("id"): element for element in root.iter()}
        title, description = (named[name] for name in str(root.get("aria-labelledby")).split())
        assert (title.tag, title.text, description.tag) == (f"{SVG}title", drawing.title, f"{SVG}desc")
        assert str(description.text).startswith("run 1: ")
        used = re.findall(r'(?:url\(|xlink:href=")#([^")]*)', drawing.svg)
        assert used and set(used) <= set(named)
        assert not re.search(r"#0[0-9a-f]{5}|<style|font-family|metadata", drawing.svg), "colours and fonts of the page"
        ids += [name for name in named if name]
    assert len(ids) == len(set(ids)), "several drawings in one page"


def test_points_are_where_they_were_logged(tmp_path: Path) -> None:
    """Perplexities 60, 58, 55 after steps 0, 2, 4: the line is as straight as they are, the dense one below it."""
    drawing = curves([load(logs.write(tmp_path / "log"))])[0]
    line = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--run0\)', drawing.svg)
    dense = re.search(r'<path d="([^"]*)"[^>]*stroke-dasharray[^>]*stroke: var\(--muted\)', drawing.svg)
    assert line and dense
    (x0, y0), (x1, y1), (x2, y2) = coordinates(line[1])
    ((_, y_dense), _) = coordinates(dense[1])
    assert x2 - x1 == pytest.approx(x1 - x0, rel=1e-4)
    assert (y1 - y0) / (y2 - y1) == pytest.approx(2 / 3, rel=1e-4)
    assert (y_dense - y2) / (y2 - y0) == pytest.approx(1, rel=1e-4), "55 - 50 = 60 - 55; y grows downwards"


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


@pytest.mark.parametrize("value", [1e308, -1e308, 0.0, 5e-324, 1e-30])
def test_hostile_numbers_can_be_drawn(value: float, tmp_path: Path) -> None:
    fields = ("loss", "cross_entropy", "divergence", "gradient_norm", "lr")
    records: list[dict[str, Any]] = [logs.look(0, abs(value) or 1.0, 1e308)]
    records += [logs.step(n, **dict.fromkeys(fields, value * (n % 2))) for n in range(1, 4)]
    records[-1]["elapsed_s"] = records[-2]["elapsed_s"]
    records.append(logs.step(2**53, tokens=2**53, elapsed_s=1e308, peak_memory_bytes=2**53))
    assert len(curves([load(logs.write(tmp_path / "log", records))])) >= 7


def test_runs_with_nothing_to_show(tmp_path: Path) -> None:
    nothing, steps = logs.write(tmp_path / "a", []), logs.write(tmp_path / "b", [logs.step(1, divergence=0.0)])
    assert curves([load(nothing)]) == []
    titles = {drawing.title for drawing in curves([load(nothing), load(steps)])}
    assert titles == {"Loss", "Cross-entropy", "Gradient norm", "Learning rate"}


def test_wide_ranges_get_a_logarithmic_axis_that_can_be_read(tmp_path: Path) -> None:
    records = [logs.step(n, gradient_norm=10.0**n) for n in range(1, 5)]
    (drawing,) = (d for d in curves([load(logs.write(tmp_path / "log", records))]) if d.title == "Gradient norm")
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", drawing.svg)
    assert {"10", "100", "1000"} <= set(labels) and not any("$" in label for label in labels)


def test_a_long_run_makes_a_small_drawing(tmp_path: Path) -> None:
    def size(steps: int) -> int:
        records = [logs.step(n, loss=(n * 7919 % 1000) / 1000) for n in range(1, steps + 1)]
        run = load(logs.write(tmp_path / "log", records, steps=steps))
        return max(len(drawing.svg) for drawing in curves([run]))

    assert size(3000) < 1.2 * size(600) < 60_000


def test_more_runs_than_colours(tmp_path: Path) -> None:
    runs = [load(logs.write(tmp_path / "log"))] * (len(MARKERS) + 1)
    assert len(MARKERS) == len(GLYPHS) and "run 9: " in curves(runs)[0].svg
    assert f"--run{len(MARKERS)}" not in curves(runs)[0].svg


def test_the_users_settings_of_matplotlib_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    run = load(logs.write(tmp_path / "log"))
    plain = [drawing.svg for drawing in curves([run])]
    with matplotlib.rc_context({"text.usetex": True, "axes.grid": False, "font.size": 30.0}):
        assert [drawing.svg for drawing in curves([run])] == plain
