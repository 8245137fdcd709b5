"""What 8-bit values cost on top of 2:4: `python -m tests.bench.quantised_quality --models DIR ... --eval TEXT ...`.

Every sparse checkpoint is written again with int8 and with fp8 values, by the command a user would type, and all three
are scored in float32, so that nothing but the stored numbers differs. `bytes_of_dense` counts what the sparse layers
store, masks and scales included, by the bytes of the same layers dense in bfloat16.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from maskgen.core.values import CODE_DTYPES
from maskgen.export.inspect import inspect
from tests.bench import record
from tests.bench.quality import maskgen, score

BF16_BYTES = 2


def main() -> None:
    """Write, score, save, print."""
    args = _arguments()
    rows = {directory.name: _row(args, directory) for directory in args.models}
    protocol = {"window": args.window, "max_windows": args.windows, "dtype": args.dtype}
    path = record.save("quantised-quality", args.label, {"protocol": protocol, "rows": rows})
    Console().print(table(rows), path.name, sep="\n", markup=False)


def _row(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Perplexity by text and bytes, by kind of values."""
    found = {"float": {**score(args, directory), "bytes_of_dense": bytes_of_dense(directory)}}
    for values in CODE_DTYPES:
        small = args.work / f"{directory.name}.{values}"
        shutil.rmtree(small, ignore_errors=True)
        maskgen(["quantise", str(directory), "--values", values, "--out", str(small)])
        found[values] = {**score(args, small), "bytes_of_dense": bytes_of_dense(small)}
        shutil.rmtree(small)
    return found


def bytes_of_dense(directory: Path) -> float:
    """Stored bytes of the packed layers by those of the same layers dense in bfloat16."""
    layers = inspect(directory).packed_layers
    dense_bytes = sum(layer.out_features * layer.in_features * BF16_BYTES for layer in layers)
    return sum(layer.stored_bytes for layer in layers) / dense_bytes


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line per checkpoint and kind of values, in Markdown."""
    texts = list(next(iter(rows.values()))["float"]["perplexity"])
    lines = [f"| checkpoint | values | bytes | {' | '.join(texts)} |", "|---|---|---:|" + "---:|" * len(texts)]
    for name, kinds in rows.items():
        for values, found in kinds.items():
            perplexities = " | ".join(f"{found['perplexity'][text]:.3f}" for text in texts)
            lines.append(f"| {name} | {values} | {found['bytes_of_dense']:.4f} | {perplexities} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="sparse checkpoints with float values")
    parser.add_argument("--label", required=True, help="names the base model in the result file")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="texts to score")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are written, and removed")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=400, help="scored of each text")
    parser.set_defaults(dtype="float32")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
