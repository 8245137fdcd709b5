"""`sparse-serve bench serve --peers ...`: a sparse model served beside what a user would pick instead.

Names of peers and tables are here; what measures is in `sparse_serve.bench.field`, imported on use.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from sparse_serve.cli.request import from_flags

if TYPE_CHECKING:
    from sparse_serve.bench.field_report import Row
    from sparse_serve.bench.field_result import Result

PEERS = ("bf16", "w8a8", "w4a16", "w4a8", "llama.cpp:q8_0", "llama.cpp:q4_0")
"""Those of `bench.peers`, for `--help`, which does not wait for torch."""

_DTYPE = "bfloat16"


def main(args: argparse.Namespace) -> int:
    """Measure, print tables, write what was asked for. Returns 0; raises `BenchError` last, if one of ours failed."""
    from maskgen.core.files import check_writable, write_json
    from sparse_serve.bench import field, field_report
    from sparse_serve.runtime.errors import BenchError, SettingsError

    if args.dtype != _DTYPE:
        raise SettingsError(f"--dtype {args.dtype}: peers compute in {_DTYPE}, so with --peers all do; leave it out")
    check_writable(args.json)
    request = from_flags(field.FieldRequest, args)
    progress = Console(stderr=True)
    # servers would end without us, too, but not in order, and our temporary folder would stay
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda number, frame: sys.exit(128 + number))

    def save(result: Result) -> None:
        if args.json and result.turns:
            write_json(args.json, field_report.record(request, result))

    result = field.run(request, lambda text: progress.print(text, markup=False, highlight=False, soft_wrap=True), save)
    save(result)  # before anything is printed, as nobody may read that
    show(result, field_report.compare(result), Console(highlight=False))
    if result.failed:
        raise BenchError("; ".join(f"{name} failed in {why}" for name, why in result.failed.items()))
    return 0


def show(result: Result, rows: Sequence[Row], console: Console) -> None:
    """Both tables, who is missing, and which rounds were disturbed."""
    from sparse_serve.gate.host import contamination

    console.print(figures_table(result, rows))
    console.print(ratios_table(rows))
    for name, reason in result.refused.items():
        console.print(f"without {name}: {reason}", markup=False, soft_wrap=True)
    for number, disturbance in enumerate(contamination(result.hosts), 1):
        if disturbance:
            console.print(f"round {number} was disturbed: {disturbance}", markup=False, soft_wrap=True)


def figures_table(result: Result, rows: Sequence[Row]) -> Table:
    """A line per server: medians over rounds, memory that it holds, how long it took to start, how its model runs."""
    shown = Table(title="served, each in its turn", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("", overflow="fold")  # names give way where it is narrow, figures never
    for title in (*(row.title for row in rows), "MB", "start\ns", "model"):
        shown.add_column(
            title, justify="left" if title == "model" else "right", no_wrap=title != "model", overflow="fold"
        )
    for entry in result.entries:
        if all(entry.name in row.medians for row in rows):
            medians = [f"{row.medians[entry.name]:.1f}" for row in rows]
            held = "" if entry.resident_bytes is None else f"{entry.resident_bytes / 1e6:,.0f}"
            code = "native" if entry.code.startswith("built for") else entry.code
            shown.add_row(entry.name, *medians, held, f"{entry.start_s:.0f}", code)
    return shown


def ratios_table(rows: Sequence[Row]) -> Table:
    """A line per pair of one of ours and a peer: how many times better ours is; red where it is worse."""
    shown = Table(title="how many times better ours is", box=box.SIMPLE_HEAD)
    for title in ("ours", "over"):
        shown.add_column(title, overflow="fold")
    for row in rows:
        shown.add_column(row.title, justify="right", no_wrap=True)
    for name, peers in rows[0].ratios.items() if rows else ():
        for peer in peers:
            cells = [_ratio(row.ratios[name][peer]) for row in rows]
            shown.add_row(name, peer, *cells, end_section=peer == list(peers)[-1])
    return shown


def _ratio(by_round: Sequence[float]) -> str:
    ratio = statistics.median(by_round)
    return f"[red]{ratio:.2f}x[/red]" if ratio < 1 else f"{ratio:.2f}x"
