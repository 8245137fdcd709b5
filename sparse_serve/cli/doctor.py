"""`sparse-serve doctor DIR`: will this checkpoint be served sparse, by what, and is it worth it on this machine?

Every bit of the masks is read and counted, as a server does at its start. Then, for each kind of layer: which kernel
serves it at which number of tokens, and why others cannot; the memory that takes, corrections included; and the time of
all sparse layers of a step against the same layers dense. Times are measured here, now or before (`tuning.selection`),
of each layer alone: the rest of a step (attention, embedding, head, sampling) comes on top and is the same for both.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import chain

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.values import FLOAT
from sparse_serve.cli.tune import Kinds, add_arguments, choices, kinds_of, show
from sparse_serve.runtime.machine import device_name
from sparse_serve.tuning.selection import Choice, buckets_of

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """Verify, measure what is not known, report. Returns 0; 1 if dense is faster anywhere, or figures are missing."""
    console = Console(highlight=False)
    checkpoint = SparseCheckpoint.open(args.checkpoint)
    config = checkpoint.config
    console.print(f"[bold]{args.checkpoint}[/bold]: {config.pattern}, {config.values} values, from {config.base_model}")
    console.print(
        f"  {len(config.targets)} layers are sparse, exactly {config.pattern.n} of every {config.pattern.m} weights "
        f"kept; dense are {', '.join(config.ignored) or 'none'}"
    )
    kinds = kinds_of(checkpoint, args.dtype)
    found = choices(kinds, args)
    device = next(iter(kinds)).device_type
    console.print(f"  on {device_name(device)} ({device}), as {str(next(iter(kinds)).dtype).removeprefix('torch.')}\n")
    show(found, kinds)
    _memory(console, checkpoint, found, kinds)
    measured = [choice for choice in found if choice.buckets]
    if measured:
        _time(console, measured, kinds)
    if config.correction is not None:
        console.print("times are without the corrections' two small products")
    behind = [choice for choice in measured if choice.slower]
    for choice in behind:
        spec = choice.spec
        console.print(
            f"[red]{spec.out_features}x{spec.in_features}: slower than dense with {choice.slower} tokens[/red]; "
            "if that is most of your traffic, serve the dense model"
        )
    return 1 if behind or len(measured) < len(found) else 0


def _memory(console: Console, checkpoint: SparseCheckpoint, found: list[Choice], kinds: Kinds) -> None:
    """What the kernels make of the weights themselves, layer after layer."""
    resident = dense = 0
    for choice in found:
        dtype = choice.spec.dtype
        for name in chain.from_iterable(kinds[choice.spec].values()):
            layer = checkpoint.layer(name)
            packed = layer.packed.to(choice.spec.device_type)
            if packed.kind == FLOAT:
                packed = replace(packed, values=packed.values.to(dtype))
            resident += sum(tensor.nbytes for tensor in choice.plan.prepare(packed).values())
            if layer.correction is not None:
                resident += layer.correction.nbytes * dtype.itemsize // layer.correction.out.element_size()
            dense += packed.dense_nbytes(dtype)
    console.print(
        f"\nmemory of these layers: {resident / 1e6:,.1f} MB instead of {dense / 1e6:,.1f} MB dense "
        f"({resident / dense:.4f} of it)"
    )


def _time(console: Console, found: list[Choice], kinds: Kinds) -> None:
    table = Table(title="all these layers of one step, one after the other", title_justify="left", box=SIMPLE_HEAD)
    for name in ("tokens", "dense ms", "sparse ms", "speedup", "fastest", "slowest layer"):
        table.add_column(name, justify="right")
    for at, tokens in enumerate(buckets_of(found[0].spec.device_type)):
        layers = [(len(kinds[choice.spec]), choice.buckets[at]) for choice in found]
        sparse_s = sum(count * bucket.seconds for count, bucket in layers)
        dense_s = sum(count * bucket.seconds * bucket.speedup for count, bucket in layers)
        speedups = [bucket.speedup for _, bucket in layers]
        numbers = (dense_s * 1e3, sparse_s * 1e3)
        ratios = (dense_s / sparse_s, max(speedups), min(speedups))
        assert all(map(math.isfinite, ratios))
        table.add_row(str(tokens), *(f"{n:,.2f}" for n in numbers), *(f"{ratio:.2f}x" for ratio in ratios))
    console.print(table)
