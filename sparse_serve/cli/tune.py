"""`sparse-serve tune DIR`: measure now which kernel serves each kind of layer, so that no server start has to.

A server measures what it does not find in the cache; this fills the cache and shows what was found. Measure on a
machine that does nothing else, and with as many threads as the server will have.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparse_serve.cli.request import from_flags

if TYPE_CHECKING:
    from sparse_serve.bench.survey import Survey
    from sparse_serve.kernels import LinearSpec
    from sparse_serve.tuning.decision import BucketChoice

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve tune`, and of `sparse-serve doctor`."""
    parser.add_argument("checkpoint", metavar="DIR", type=Path, help="a sparse checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="as it will be served (default: the checkpoint's)")
    parser.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help='as it will be served; int8: with "activations": "int8" in --additional-config (default: float)',
    )
    parser.add_argument("--threads", type=int, metavar="N", help="as many as the server has (default: all cores)")


def main(args: argparse.Namespace) -> int:
    """Measure, keep, show. Returns 0."""
    from sparse_serve.bench import survey

    show(survey.tune(from_flags(survey.SurveyRequest, args), progress))
    return 0


def progress(kinds: list[LinearSpec]) -> Iterable[LinearSpec]:
    """Go through `kinds` under a bar that disappears at the end."""
    return track(kinds, "measuring kernels", console=Console(stderr=True), transient=True)


def show(found: Survey) -> None:
    """A line per kind of layer: what serves how many tokens, and how much faster than dense that is."""
    from sparse_serve.tuning.selection import buckets_of

    title = "speed against a dense layer, by number of tokens"
    tokens = buckets_of(next(iter(found.kinds)).device_type)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("layers", "out x in", "kernel", *map(str, tokens)):
        table.add_column(
            name, justify="left" if name == "layers" else "right", no_wrap=name != "layers", overflow="fold"
        )
    reasons: dict[str, str] = {}
    for choice in found.choices:
        names, spec = found.kinds[choice.spec], choice.spec
        last = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        cells = [_cell(bucket, len(choice.plan.kernels) > 1) for bucket in choice.buckets] or ["-"] * len(tokens)
        shape, kernels = f"{spec.out_features}x{spec.in_features}", "+".join(choice.plan.kernels)
        table.add_row(f"{len(names)} {last}", shape, kernels, *cells)
        reasons.update(choice.unsupported)
    console = Console(highlight=False)
    console.print(table)
    if len(found.measured) < len(found.choices):
        console.print("  -: could not be measured")
    if (error := rounding_error(found)) is not None:
        console.print(
            f"  activations are rounded to int8: normally distributed inputs change by {error:.1%} of their size, "
            "inputs with outliers by more; the quality that [bold]sparse-serve gate run[/bold] measures, with this "
            "flag for the candidate, shows what your text loses"
        )
    for name, reason in reasons.items():
        console.print(f"  {name} was left out: {reason}", markup=False)


def rounding_error(found: Survey) -> float | None:
    """How far rounding moves normally distributed inputs of the first layer whose kernel rounds them, as a part of
    their Euclidean norm; None if no kernel does."""
    from sparse_serve.tuning.samples import random_input

    for choice in found.choices:
        x_TI = random_input(choice.spec, 1)
        moved = (choice.plan.multiplied(1, x_TI) - x_TI.double()).norm() / x_TI.double().norm()
        if moved > 0:
            return float(moved)
    return None


def _cell(bucket: BucketChoice, named: bool) -> str:
    colour = "red" if bucket.speedup < 1 else "default"
    return f"[{colour}]{bucket.speedup:.2f}[/{colour}]" + (f"\n{bucket.kernel}" if named else "")
