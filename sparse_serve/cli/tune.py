"""`sparse-serve tune DIR`: measure now which kernel serves each kind of layer, so that no server start has to.

A server measures what it does not find in the cache (`tuning.selection`); this fills the cache, for one rank, as the
model's layers are in vLLM (query, key and value are one layer there), and shows what was found. Measure on a machine
that does nothing else, and with as many threads as the server will have: figures of other numbers of threads are
others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.errors import FormatError
from sparse_serve.kernels import LinearSpec
from sparse_serve.plugin.dense import dense_layers
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.tuning.decision import Bucket
from sparse_serve.tuning.selection import AUTO, Ask, Choice, buckets_of, choice_for

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Kinds = dict[LinearSpec, dict[str, list[str]]]
"""By what a kernel sees of them: layers as vLLM has and names them, and the checkpoint's layers each consists of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve tune`, and of `sparse-serve doctor`."""
    parser.add_argument("checkpoint", metavar="DIR", type=Path, help="a sparse checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="as it will be served (default: the checkpoint's)")
    parser.add_argument("--threads", type=int, metavar="N", help="as many as the server has (default: all cores)")


def main(args: argparse.Namespace) -> int:
    """Measure, keep, show. Returns 0."""
    checkpoint = SparseCheckpoint.open(args.checkpoint, verify_bits=False)
    kinds = kinds_of(checkpoint, args.dtype)
    show(choices(kinds, args, Ask.AGAIN), kinds)
    return 0


def kinds_of(checkpoint: SparseCheckpoint, dtype: str | None) -> Kinds:
    """The kinds of sparse layers that a server of this checkpoint has, on a single rank."""
    config, kinds = checkpoint.config, Kinds()
    served = DTYPES[dtype] if dtype else checkpoint.weight_dtype(config.targets[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, parts in _served(checkpoint):
        shapes = [checkpoint.headers[f"{part}.bitmask"].shape for part in parts]
        spec = LinearSpec(
            sum(rows for rows, _ in shapes), shapes[0][1] * 8, config.pattern, served, device, config.values
        )
        kinds.setdefault(spec, {})[name] = parts
    return kinds


def choices(kinds: Iterable[LinearSpec], args: argparse.Namespace, ask: Ask = Ask.ALWAYS) -> list[Choice]:
    """One for each kind, measured where the cache does not know; a bar shows how far it is."""
    if args.threads is not None:
        if args.threads < 1:
            raise SettingsError(f"--threads {args.threads}: expected 1 or more")
        torch.set_num_threads(args.threads)
    bar = track(list(kinds), "measuring kernels", console=Console(stderr=True), transient=True)
    return [choice_for(spec, AUTO, dense_layers(spec.device_type), ask) for spec in bar]


def show(found: Sequence[Choice], kinds: Kinds) -> None:
    """A line per kind of layer: what serves how many tokens, and how much faster than dense that is."""
    title = "speed against a dense layer, by number of tokens"
    measured = buckets_of(next(iter(kinds)).device_type)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("layers", "out x in", "kernel", *map(str, measured)):
        table.add_column(name, justify="left" if name == "layers" else "right", no_wrap=True)
    reasons: dict[str, str] = {}
    for choice in found:
        names, spec = kinds[choice.spec], choice.spec
        last = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        cells = [_cell(bucket, len(choice.plan.kernels) > 1) for bucket in choice.buckets] or ["-"] * len(measured)
        shape, kernels = f"{spec.out_features}x{spec.in_features}", "+".join(choice.plan.kernels)
        table.add_row(f"{len(names)} {last}", shape, kernels, *cells)
        reasons.update(choice.unsupported)
    console = Console(highlight=False)
    console.print(table)
    if not all(choice.buckets for choice in found):
        console.print("  -: could not be measured")
    for name, reason in reasons.items():
        console.print(f"  {name} was left out: {reason}", markup=False)


def _cell(bucket: Bucket, named: bool) -> str:
    colour = "red" if bucket.speedup < 1 else "default"
    return f"[{colour}]{bucket.speedup:.2f}[/{colour}]" + (f"\n{bucket.kernel}" if named else "")


def _served(checkpoint: SparseCheckpoint) -> Iterator[tuple[str, list[str]]]:
    """Name in vLLM, and the checkpoint's layers that are in it; `FormatError` where vLLM would refuse too."""
    from sparse_serve.plugin.fused import fused_layers  # seconds, which --help does not have

    targets = set(checkpoint.config.targets)
    fused = fused_layers(checkpoint.hf_config.get("architectures") or [])
    whole = {part: (name, parts) for name, parts in fused.items() for part in parts}
    done: set[str] = set()
    for target in checkpoint.config.targets:
        parent, _, leaf = target.rpartition(".")
        name, leaves = whole.get(leaf, (leaf, [leaf]))
        parts = [f"{parent}.{part}" for part in leaves]
        if not set(parts) <= targets:
            raise FormatError(
                f"{parent}.{name} is one layer in vLLM, but of {parts} only {sorted(targets & set(parts))} are sparse; "
                "make all of them sparse or none"
            )
        if parts[0] not in done:
            done.update(parts)
            yield f"{parent}.{name}", parts
