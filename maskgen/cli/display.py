"""What a person sees of `maskgen` in the end: tables and closing lines. No work is done here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskgen.api.converting import ConvertResult, PermuteResult
from maskgen.api.pruning import AlreadyFinished, LearnResult, PruneResult
from maskgen.cli.kept import print_kept
from maskgen.cli.progress import duration, megabytes
from maskgen.core.settings import NOT_RECORDED
from maskgen.core.values import INT4
from maskgen.export.compress import CompressReport
from maskgen.export.inspect import InspectReport
from maskgen.export.slice import ShrinkReport
from maskgen.sweep.report import SweepReport
from maskgen.train.result import DenseReport, Written


def say(text: str) -> None:
    """One line on stdout, as it is."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_run(result: PruneResult | LearnResult | AlreadyFinished) -> None:
    """What a run did, what it wrote, and what to do with it."""
    if isinstance(result, PruneResult):
        _print_sweep(result.sweep, result.peak_memory_bytes)
        if result.bos is not None:
            say(f"  calibration windows: {result.bos.describe()}")
        if result.allocation is not None:
            say(f"  {result.allocation.describe()}")
        print_kept(result.plan.kept)
        print_compressed(result.out, result.written)
    elif isinstance(result, LearnResult):
        print_training(result.records, result.log)
        if result.allocation is not None:
            say(f"  {result.allocation.describe()}")
        print_kept(result.plan.kept)
        _print_written(result.out, result.written)
    else:
        say(f"{result.out} is finished; what an earlier process had left of its work directory is removed")


def _print_sweep(report: SweepReport, peak_bytes: int) -> None:
    did = "added a correction to" if report.corrects else "pruned"
    say(
        f"{did} {len(report.targets)} layers, {report.million_weights:,.1f} M weights, in {report.total_s:.1f} s "
        f"({report.s_per_million_weights:.2f} s per M), peak memory {megabytes(peak_bytes)}"
    )
    if report.resumed_blocks:
        say(f"  {report.resumed_blocks} blocks were finished by an earlier run")


def _print_written(out: Path, written: Written) -> None:
    if isinstance(written, CompressReport):
        print_compressed(out, written)
    elif isinstance(written, DenseReport):
        say(f"wrote {out}: dense, {megabytes(written.total_bytes)}")
        say(f"next: maskgen eval {out} --data FILE")
    else:
        _print_shrunk(out, written)


def print_compressed(out: Path, written: CompressReport) -> None:
    """What was written, and what to do with it."""
    say(
        f"wrote {out}: target weights {megabytes(written.dense_target_bytes)} dense -> "
        f"{megabytes(written.packed_target_bytes)} ({written.ratio:.2%}), directory {megabytes(written.total_bytes)}"
    )
    if written.ratio >= 1:
        say("note: that is no less than dense; a correction of a lower rank, or none, saves bytes")
    say(f"next: maskgen eval {out} --data FILE    or    sparse-serve serve {out}")


def print_converted(result: ConvertResult) -> None:
    """What was found, what became of it, and what to do with it."""
    report = result.report
    say(
        f"wrote {result.out} from {report.found}: {report.targets} layers sparse, {report.values} values; "
        f"{megabytes(report.source_bytes)} -> {megabytes(report.total_bytes)}"
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in report.dense.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        say(f"  dense: {len(names)} layers, such as {names[0]}: {reason}")
    for note in report.notes:
        say(f"  {note}")
    say(f"next: maskgen eval {result.out} --data FILE    or    sparse-serve serve {result.out}")


def print_training(log: Sequence[Mapping[str, Any]], log_file: Path) -> None:
    """What a training run did, from its log: where the masks were, where they are, what it took."""
    steps = [record for record in log if record["kind"] == "step"]
    looks = [record for record in log if record["kind"] == "eval"]
    tokens, first, last = sum(record["tokens"] for record in steps), looks[0], looks[-1]
    dense = f"; dense {first['dense_perplexity']:.2f}" if "dense_perplexity" in first else ""
    where = "GPU" if log[0]["hardware"]["device"].startswith("cuda") else "host"
    say(f"held-out perplexity {first['perplexity']:.2f} at the start -> {last['perplexity']:.2f}{dense}")
    say(
        f"  {len(steps)} steps, {tokens:,} tokens, {duration(last['elapsed_s'])}, peak memory of the {where} "
        f"{megabytes(max(record['peak_memory_bytes'] for record in steps))}"
    )
    say(f"  {last['agreement']:.2%} of the mask is as it was at the start; log in {log_file}")


def _print_shrunk(out: Path, written: ShrinkReport) -> None:
    """What was written, when whole heads and neurons were removed."""
    kept = ", ".join(f"{count} {kind}" for kind, count in written.keep.items())
    say(
        f"wrote {out}: {written.fraction:.2%} of the parameters of the blocks ({kept} per layer), directory "
        f"{megabytes(written.total_bytes)}"
    )
    say(f"next: maskgen eval {out} --data FILE    or    maskgen run sparsegpt --model {out} --data FILE --out DIR")


def print_permuted(result: PermuteResult) -> None:
    """What was written, when neurons changed places."""
    out, report, recipe = result.out, result.report, result.recipe
    before, after = report.kept
    say(
        f"wrote {out}: the same function, neurons of {len(report.arrangements)} layers reordered, directory "
        f"{megabytes(report.total_bytes)}"
    )
    say(f"  of the {recipe.method.name} scores there {recipe.pattern} keeps {before:.2%} -> {after:.2%}")
    say(f"next: maskgen run {recipe.method.name} --model {out} --data FILE --out DIR, or any other recipe")


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def print_inspect(report: InspectReport) -> None:
    """A table, one line per matrix."""
    kind = "sparse checkpoint" if report.compressed else "dense model"
    values = f", {report.values} values" if report.compressed else ""
    if report.values == INT4:
        values += f" (a scale for each {report.group or 'row'})"
    say(f"{report.path}: {kind}, pattern {report.pattern}{values}")
    table = Table()
    for heading in ("layer", "stored"):
        table.add_column(heading, overflow="fold")
    for heading in ("shape", report.pattern, "zeros", "MB"):
        table.add_column(heading, justify="right")
    for layer in sorted(report.layers, key=lambda layer: _by_number(layer.name)):
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
    print_kept(report.kept)
    if report.digests:
        say(f"  all {report.digests} shards have the digests that the manifest states")
    elif report.compressed:
        say("  no digests: written in an earlier version of the format (maskgen convert adds them)")
    if report.settings:
        say(f"  config.json and {report.settings - 1} files beside the weights are as they were written")
    elif report.compressed:
        say(f"  config.json and the tokenizer are not covered: {NOT_RECORDED}")
    if report.allocation is not None:
        say(f"  {report.allocation.describe()}")
    correction_bytes = sum(layer.correction_bytes for layer in report.layers)
    if report.correction is not None:
        form = ", ".join(f"{key} {value}" for key, value in report.correction.items())
        say(f"  {megabytes(correction_bytes)} of what is stored are corrections: {form}")
