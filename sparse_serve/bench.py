"""`sparse-serve bench`: is a sparse linear layer faster than the dense one, on this machine, at every number of tokens?

For each shape and number of tokens, in one interleaved run (`timing`): torch's dense linear, the dense linear that vLLM
would run, every kernel that does not refuse, with values in the activations' dtype and in int8, and a plain read of the
compressed bytes, which no kernel can beat by much when there is one token. Weights are random. A speedup is against
the faster of the two dense ones, and below 1 means that serving dense would have been better.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sparse_serve.kernels as folder
from maskgen.core.folder import names
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT
from sparse_serve.errors import KernelError, SettingsError
from sparse_serve.kernels import LinearSpec, choose, cpu
from sparse_serve.timing import Call, interleaved
from sparse_serve.vllm_dense import stock_linear, torch_linear

PATTERN = NMPattern(2, 4)
SHAPES = "14336x4096,4096x4096"
TOKENS = "1,4,16,64,256"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DENSE = ("dense torch", "dense vllm")
READ = "read of cpu's bytes"
POOL_BYTES = 192 << 20
"""Weights of one contender, over all copies: several times what a last-level cache holds."""


@dataclass(frozen=True)
class Result:
    """One shape and number of tokens: median seconds by contender, and each kernel's speedup over the faster dense."""

    out_features: int
    in_features: int
    tokens: int
    median_s: dict[str, float]
    speedup: dict[str, float]
    compressed_bytes: int
    rounds: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve bench`."""
    parser.add_argument("--shapes", default=SHAPES, metavar="OxI,...", help=f"out x in features (default: {SHAPES})")
    parser.add_argument("--tokens", default=TOKENS, metavar="N,...", help=f"tokens per call (default: {TOKENS})")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations and dense weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: all cores")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="per table row (default: 5)")
    parser.add_argument("--with-reference", action="store_true", help="time the slow reference kernel too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all medians and ratios")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table as it grows, write JSON. Returns 0."""
    if args.threads < 1:
        raise SettingsError(f"--threads {args.threads}: expected 1 or more")
    torch.set_num_threads(args.threads)
    shapes = [_numbers(shape, "x", "--shapes", 2) for shape in args.shapes.split(",")]
    tokens = _numbers(args.tokens, ",", "--tokens")
    results = []
    for out_features, in_features in shapes:
        layers = _contenders(out_features, in_features, DTYPES[args.dtype], args.with_reference)
        for count in tokens:
            results.append(_measure(layers, out_features, in_features, count, DTYPES[args.dtype], args.seconds))
            Console(stderr=True).print(f"{out_features}x{in_features}, {count} tokens: {results[-1].rounds} rounds")
    Console().print(table(results))
    if args.json:
        args.json.write_text(
            json.dumps({**_machine(args), "results": [asdict(result) for result in results]}, indent=1)
        )
    return 0


Layer = dict[str, list[Any]]


def _contenders(out_features: int, in_features: int, dtype: torch.dtype, with_reference: bool) -> Layer:
    """Functions of x by contender, one per copy of its weights; and the compressed bytes of every copy to read."""
    weight_OI = torch.randn(out_features, in_features).mul_(in_features**-0.5).to(dtype)
    packed = PackedTensor.pack(weight_OI, PATTERN.mask_from_scores(weight_OI.float().abs()), PATTERN)
    dense = _copies(weight_OI.nbytes)
    layers: Layer = {
        DENSE[0]: [torch_linear(weight_OI.clone()) for _ in range(dense)],
        DENSE[1]: [stock_linear(weight_OI.clone()) for _ in range(dense)],
    }
    for name in names(folder):
        for values in (FLOAT, "int8"):
            stored = packed.quantised(values)
            spec = LinearSpec(out_features, in_features, PATTERN, dtype, "cpu", values)
            try:
                kernel = choose(spec, name)
            except KernelError as error:
                Console(stderr=True).print(f"not measured: {error}", markup=False)
                continue
            if name == "reference" and not with_reference:
                continue
            prepared = [kernel.prepare(stored) for _ in range(_copies(stored.nbytes))]
            label = name if values == FLOAT else f"{name} {values}"
            layers[label] = [lambda x, run=kernel.linear, at=tensors: run(x, at, None) for tensors in prepared]
            if name == "cpu" and values == FLOAT:
                half = len(prepared) // 2  # not the copy that the kernel has just brought into the cache
                layers[READ] = [tensors["blocks"] for tensors in prepared[half:] + prepared[:half]]
    return layers


def _measure(
    layers: Layer, out_features: int, in_features: int, tokens: int, dtype: torch.dtype, budget_s: float
) -> Result:
    x_TI = torch.randn(tokens, in_features).to(dtype)
    calls: dict[str, list[Call]] = {
        name: [_call(layer, x_TI) for layer in copies] for name, copies in layers.items() if name != READ or tokens == 1
    }
    times = interleaved(calls, budget_s)
    kernels = [name for name in calls if name not in (*DENSE, READ)]
    return Result(
        out_features,
        in_features,
        tokens,
        {name: times.median_s(name) for name in calls},
        {name: times.speedup(name, DENSE) for name in kernels},
        layers[READ][0].nbytes if READ in layers else 0,
        len(times.seconds[DENSE[0]]),
    )


def _call(layer: Any, x_TI: Tensor) -> Call:
    if isinstance(layer, Tensor):
        return lambda: torch.ops.sparse_serve_cpu.read(layer)
    return lambda: layer(x_TI)


def table(results: Sequence[Result]) -> Table:
    """One line per contender, one section per shape and number of tokens; speedups below 1 in red."""
    shown = Table(title="2:4 linear layers against the faster of the dense ones")
    for name in ("out x in", "tokens", "layer", "ms", "speedup"):
        shown.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for result in results:
        where = [f"{result.out_features}x{result.in_features}", str(result.tokens)]
        for name, median_s in result.median_s.items():
            ratio = result.speedup.get(name)
            colour = "red" if ratio is not None and ratio < 1 else "default"
            cell = "" if ratio is None else f"[{colour}]{ratio:.2f}x[/{colour}]"
            shown.add_row(*where, name, f"{median_s * 1e3:.3f}", cell)
            where = ["", ""]
        shown.add_section()
    return shown


def _copies(nbytes: int) -> int:
    return max(2, -(-POOL_BYTES // nbytes))


def _numbers(text: str, separator: str, flag: str, count: int | None = None) -> list[int]:
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or count not in (None, len(parts)):
        raise SettingsError(
            f"{flag} {text!r}: expected whole numbers above 0 joined by {separator!r}, as 4096x4096 or 1,4"
        )
    return [int(part) for part in parts]


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": args.threads,
        "isa": cpu.isa() if hasattr(torch.ops.sparse_serve_cpu, "isa") else None,
        "dtype": args.dtype,
        "torch": str(torch.__version__),
    }
