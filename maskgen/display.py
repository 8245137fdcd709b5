"""What a person sees of `maskgen`: progress bars, log lines, tables and last words. No work is done here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from maskgen.compress import CompressReport
from maskgen.inspect import InspectReport
from maskgen.model import OUTSIDE
from maskgen.sweep import Progress, SweepReport

LOG_EVERY_S = 10.0
"""Seconds between progress lines where there is no terminal."""


def megabytes(size_bytes: int) -> str:
    """For people: `1,234.5 MB`."""
    return f"{size_bytes / 1e6:,.1f} MB"


@contextmanager
def bar() -> Iterator[ProgressBar]:
    """A progress bar on stderr, or log lines where that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    if console.is_terminal:
        with ProgressBar(*columns, console=console, transient=True) as bar:
            yield bar
    else:
        yield _LogLines(console)


class _LogLines(ProgressBar):
    """For logs, where a bar that redraws itself shows nothing: now and then a line."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self.said_s = time.monotonic()

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        if time.monotonic() - self.said_s >= LOG_EVERY_S:
            self.said_s = time.monotonic()
            task = self.tasks[task_id]
            total = "" if task.total is None else f" {task.completed:g}/{task.total:g}"
            self.console.print(
                f"{task.description}{total} {task.fields.get('note', '')}", highlight=False, markup=False
            )


def sweep_progress(bar: ProgressBar, task: TaskID) -> Callable[[Progress], None]:
    """A sweep's callback that moves `bar`."""

    def show(progress: Progress) -> None:
        bar.update(
            task,
            description=f"block {progress.block + 1}/{progress.blocks}",
            completed=progress.block,
            total=progress.blocks,
            note=f"{progress.what}  peak memory {megabytes(progress.peak_rss_bytes)}",
        )

    return show


def say(text: str) -> None:
    """One line on stdout, as it is."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_run(out: Path, report: SweepReport, written: CompressReport, peak_bytes: int) -> None:
    """What a run did and cost; `peak_bytes` is the peak of all of it."""
    say(
        f"pruned {len(report.targets)} layers, {report.million_weights:,.1f} M weights, in {report.total_s:.1f} s "
        f"({report.s_per_million_weights:.2f} s per M), peak memory {megabytes(peak_bytes)}"
    )
    if report.resumed_blocks:
        say(f"  {report.resumed_blocks} blocks were finished by an earlier run")
    for name, why in report.ignored.items():
        if why != OUTSIDE:
            say(f"  kept dense: {name}: {why}")
    print_compressed(out, written)


def print_compressed(out: Path, written: CompressReport) -> None:
    """What was written, and what to do with it."""
    say(
        f"wrote {out}: target weights {megabytes(written.dense_target_bytes)} dense -> "
        f"{megabytes(written.packed_target_bytes)} ({written.ratio:.2%}), directory {megabytes(written.total_bytes)}"
    )
    say(f"next: maskgen eval {out} --data FILE    or    sparse-serve serve {out}")


def print_inspect(report: InspectReport) -> None:
    """A table, one line per matrix."""
    kind = "sparse checkpoint" if report.compressed else "dense model"
    say(f"{report.path}: {kind}, pattern {report.pattern}")
    table = Table()
    for heading in ("layer", "stored"):
        table.add_column(heading, overflow="fold")
    for heading in ("shape", report.pattern, "zeros", "MB"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        table.add_row(
            Text(layer.name),
            layer.stored,
            f"{layer.out_features} x {layer.in_features}",
            "yes" if layer.follows else "no",
            f"{layer.zeros:.1%}",
            f"{layer.stored_bytes / 1e6:,.2f}",
        )
    Console().print(table)
    dense_bytes = sum(layer.dense_bytes for layer in report.layers)
    stored_bytes = sum(layer.stored_bytes for layer in report.layers)
    say(
        f"{len(report.packed_layers)} of {len(report.layers)} matrices packed; {megabytes(stored_bytes)} stored, "
        f"{megabytes(dense_bytes)} if dense, {megabytes(report.other_bytes)} of other tensors"
    )
