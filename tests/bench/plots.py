"""Pictures of the manual, made of records. They are drawn as the site is built, and `KERNELS` by `make reference`, too:
README shows it, which nobody builds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sparse_serve.bench import kernels, roofline
from tests.bench import frontier_chart, quality_table, record, schema
from tests.bench.quality import ROWS, WHAT
from tests.bench.tables.quality import frontier_points, frontier_speeds

KERNELS = "kernels.svg"
_RUN = "kernels--cpu-bfloat16-2threads--x86_64-2core--20261123-012132"
"""The last of three runs in bfloat16, which the table beside it has all of."""


def draw_kernels(file: Path) -> None:
    """The roofline of one run of `sparse-serve bench kernels`."""
    run = schema.current()[_RUN]
    results = [kernels.Result(**result) for result in run["results"]]
    shown = ", ".join([run["dtype"], f"threads: {run['threads']}", run["isa"]])
    title = f"2:4 against dense linear layers on {run['processor']} ({shown})"
    roofline.roofline(kernels.panels(results), kernels.roof(results), title, file)


def draw_recipes(file: Path) -> None:
    """What every recipe costs the 7 M model."""
    quality_table.plot(record.load(WHAT, "reference-7m"), [row.name for row in ROWS], file)


def draw_frontier(file: Path) -> None:
    """Quality of SmolLM2-135M against bytes, and against speed."""
    frontier_chart.plot(frontier_points(), frontier_speeds(), file)


PLOTS: Mapping[str, Callable[[Path], None]] = {
    KERNELS: draw_kernels,
    "recipes-7m.svg": draw_recipes,
    "frontier.svg": draw_frontier,
}
