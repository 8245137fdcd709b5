"""`sparse-serve doctor [DIR]`: will this checkpoint be served sparse, by what, and is it worth it on this machine?

Without a checkpoint it is the installation that is looked at: versions, and whether each kernel runs and is right.

Every bit of the masks is read and counted, as a server does at its start, the shards are compared with their digests,
and `config.json` and the tokenizer with the record of what was written. vLLM's model is built without weights: does it
have every sparse layer, and why are the others dense? Then, for each kind of layer: which kernel serves it at which
number of tokens, and why others cannot; the memory that takes; and the time of all sparse layers of a step against the
same layers dense.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparse_serve.cli import tune
from sparse_serve.cli.request import from_flags
from sparse_serve.runtime.errors import SettingsError

if TYPE_CHECKING:
    from maskgen.core.settings import SettingsRecord
    from sparse_serve.bench.layer_peers import PeerTimes
    from sparse_serve.bench.survey import Memory, StepTime, Survey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve doctor`, which are those of `tune`."""
    parser.epilog = (
        "exit status: 0 fine, 1 dense is faster somewhere or could not be measured (without DIR: something is "
        "missing or wrong), 2 wrong usage or input"
    )
    tune.add_arguments(parser)
    checkpoint = next(action for action in parser._actions if action.dest == "checkpoint")
    checkpoint.nargs, checkpoint.required = "?", False
    checkpoint.help = "a sparse checkpoint (default: none; the installation is checked)"
    peers = "also time these layers as vLLM's W8A8 and int4 have them, on a CPU: what a user would pick instead"
    parser.add_argument("--peers", action="store_true", help=peers)


def main(args: argparse.Namespace) -> int:
    """Verify, measure what is not known, report. Returns 0; 1 if dense is faster anywhere, or figures are missing."""
    if args.checkpoint is None:
        if args.peers:
            raise SettingsError("--peers: there are no layers to time without a checkpoint; name its directory")
        return _installation()
    from maskgen.core.checkpoint import SparseCheckpoint
    from maskgen.core.settings import check_settings
    from sparse_serve.bench import survey

    checkpoint = SparseCheckpoint.open(args.checkpoint, verify_bits=False)
    if checkpoint.config.shards is not None:
        checkpoint.verify_digests()
    record = check_settings(args.checkpoint)
    found = survey.examine(from_flags(survey.SurveyRequest, args), tune.progress)
    assert found.memory is not None
    console = Console(highlight=False)
    _describe(console, found, record)
    tune.show(found)
    console.print(f"\n{memory_line(found.memory)}")
    if found.measured:
        console.print(_times(found.step_times()))
    if found.checkpoint.config.correction is not None:
        console.print("times are with the corrections' two small products")
    if args.peers:
        _peers(console, found, args.threads)
    for choice in found.slower:
        spec, tokens = choice.spec, ", ".join(map(str, choice.slower))
        console.print(
            f"[red]{spec.out_features}x{spec.in_features}: slower than dense with {tokens} tokens[/red]; "
            "if that is most of your traffic, serve the dense model"
        )
    return 1 if found.slower or len(found.measured) < len(found.choices) else 0


def _installation() -> int:
    from sparse_serve.bench import installation

    found = installation.examine()
    console = Console(highlight=False, soft_wrap=True)
    console.print(", ".join(f"{name} {version}" for name, version in found.versions.items()))
    console.print(f"on {found.device}; a 2:4 layer by each kernel, against the exact product:", markup=False)
    for name, state in found.kernels.items():
        console.print(f"  {name}: {state}", markup=False)
    problems = found.problems()
    for problem in problems:
        console.print(f"problem: {problem}", markup=False)
    return 1 if problems else 0


def _describe(console: Console, found: Survey, record: SettingsRecord | None) -> None:
    from maskgen.core.quality import UNKNOWN, known_quality
    from maskgen.core.settings import NOT_RECORDED
    from sparse_serve.runtime.machine import device_name

    config, spec = found.checkpoint.config, next(iter(found.kinds))
    console.print(
        f"[bold]{found.checkpoint.path}[/bold]: {config.pattern}, {config.values} values, from {config.base_model}"
    )
    console.print(
        f"  {len(config.targets)} layers are sparse, exactly {config.pattern.n} of every {config.pattern.m} weights "
        "kept"
    )
    shards = config.shards
    console.print(f"  shards have their digests: {len(shards)}" if shards else "  no digests, as in format version 2")
    if record is None:
        console.print(f"  config.json and the tokenizer are not covered: {NOT_RECORDED}", soft_wrap=True)
    else:
        console.print(f"  config.json and {len(record.files)} files beside the weights are as they were written")
    for line in dense_lines(found.dense):
        console.print(f"  dense: {line}")
    dtype = str(spec.dtype).removeprefix("torch.")
    console.print(f"  on {device_name(spec.device_type)} ({spec.device_type}), as {dtype}")
    quality = known_quality(found.checkpoint.path)
    first, *others = [UNKNOWN.format(found.checkpoint.path)] if quality is None else quality.lines()
    for line in (f"quality: {first}", *others, ""):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def dense_lines(dense: Mapping[str, str]) -> list[str]:
    """The layers that are dense, a line for each reason; numbers of blocks and experts as "*"."""
    reasons: dict[str, dict[str, None]] = {}
    for name, reason in dense.items():
        reasons.setdefault(reason, {})[re.sub(r"\.\d+(?=\.|$)", ".*", name)] = None
    return [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]


def memory_line(memory: Memory) -> str:
    """Memory in words."""
    corrections = (
        f", {memory.correction_bytes / 1e6:,.1f} MB of that for corrections" if memory.correction_bytes else ""
    )
    return (
        f"memory of these layers: {memory.resident_bytes / 1e6:,.1f} MB instead of {memory.dense_bytes / 1e6:,.1f} MB "
        f"dense ({memory.resident_bytes / memory.dense_bytes:.4f} of it){corrections}"
    )


def _peers(console: Console, found: Survey, threads: int | None) -> None:
    from sparse_serve.bench import layer_peers

    with console.status("measuring vLLM's quantised layers"):
        times = layer_peers.compare(found, threads)
    console.print(peers_table(times))
    for what, reason in times.refused.items():
        console.print(f"  {what} was left out: {reason}", markup=False, soft_wrap=True)


def peers_table(times: PeerTimes) -> Table:
    """A line per number of tokens and peer; where sparse is slower its speedup is red."""
    title = "these layers as vLLM's quantised ones, without corrections"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("tokens", "instead", "layers", "its ms", "sparse ms", "speedup"):
        table.add_column(name, justify="left" if name == "instead" else "right")
    for step in times.steps:
        ratio = step.peer_s / step.sparse_s
        shown = f"[red]{ratio:.2f}x[/red]" if ratio < 1 else f"{ratio:.2f}x"
        milliseconds = [f"{seconds * 1e3:,.2f}" for seconds in (step.peer_s, step.sparse_s)]
        table.add_row(str(step.tokens), step.peer, str(step.layers), *milliseconds, shown)
    return table


def _times(times: list[StepTime]) -> Table:
    table = Table(title="all these layers of one step, one after the other", title_justify="left", box=SIMPLE_HEAD)
    for name in ("tokens", "dense ms", "sparse ms", "speedup", "fastest", "slowest layer"):
        table.add_column(name, justify="right")
    for step in times:
        milliseconds = [f"{seconds * 1e3:,.2f}" for seconds in (step.dense_s, step.sparse_s)]
        ratios = [f"{ratio:.2f}x" for ratio in (step.dense_s / step.sparse_s, step.best, step.worst)]
        table.add_row(str(step.tokens), *milliseconds, *ratios)
    return table
