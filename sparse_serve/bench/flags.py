"""`sparse-serve bench`: how fast sparse is, against dense, on this machine.

`bench kernels` times single linear layers, `bench serve` two models behind a server. Flags are here and the work is in
`kernels` and `serve`, imported on use, so that `--help` does not wait for torch and vLLM.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")

_HELP = {
    "kernels": "time sparse linear layers against dense ones",
    "serve": "time a sparse model against its dense base, with vLLM's own serving benchmark",
}
_SERVE_EPILOG = """What follows -- goes to both servers: ... --sparse DIR -- --max-model-len 1024.
The two models are served one after the other, never at once, and change places from round to round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve bench kernels` and `sparse-serve bench serve`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_kernels(kinds.add_parser("kernels", help=_HELP["kernels"], description=_HELP["kernels"]))
    _add_serve(kinds.add_parser("serve", help=_HELP["serve"], description=_HELP["serve"], epilog=_SERVE_EPILOG))


def main(args: argparse.Namespace) -> int:
    """Measure, print tables, write what was asked for. Returns 0."""
    measure = importlib.import_module(f"sparse_serve.bench.{args.kind}").main
    return int(measure(args))


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", type=_shapes, default="14336x4096,4096x4096", metavar="OxI,...", help="default: %(default)s")
    add("--tokens", type=_wholes, default="1,4,16,64,256", metavar="N,...", help="per call (default: %(default)s)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of activations and dense weights (default: %(default)s)")
    add("--threads", type=_whole, metavar="N", help="default: all cores")
    add("--seconds", type=float, default=5.0, metavar="S", help="per shape and tokens (default: %(default)s)")
    add("--with-reference", action="store_true", help="time the slow reference kernel too")
    add("--plot", type=Path, metavar="FILE", help="also draw a roofline: .svg, .png or .pdf")
    _add_json(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dense", type=Path, required=True, metavar="DIR", help="the dense model")
    add("--sparse", type=Path, required=True, metavar="DIR", help="a sparse checkpoint of the same model")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of both (default: %(default)s)")
    add("--clients", type=_wholes, default="1,8", metavar="N,...", help="requests at a time (default: %(default)s)")
    add("--requests", type=_whole, default=4, metavar="N", help="of each client (default: %(default)s)")
    add("--input-tokens", type=_whole, default=128, metavar="N", help="of a prompt (default: %(default)s)")
    add("--output-tokens", type=_two_or_more, default=128, metavar="N", help="generated (default: %(default)s)")
    add("--rounds", type=_whole, default=3, metavar="N", help="default: %(default)s")
    add("vllm_flags", nargs="*", metavar="VLLM_FLAG", help="any flag of `vllm serve`, after --")
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure, versions and commit")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _two_or_more(text: str) -> int:
    if _whole(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 2 or more, as time per token is counted from the first")
    return int(text)


def _wholes(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",")]


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for shape in text.split(","):
        out_features, _, in_features = shape.partition("x")
        shapes.append((_whole(out_features), _whole(in_features)))
    return shapes
