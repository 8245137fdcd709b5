"""`sparse-serve bench`: how fast sparse is, against dense, on this machine.

`bench kernels` times single linear layers, `bench serve` two models behind a server. Flags and tables are here; what
measures is in `sparse_serve.bench`, imported on use, so that `--help` does not wait for torch and vLLM.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from sparse_serve.cli import field
from sparse_serve.cli.request import from_flags

if TYPE_CHECKING:
    from sparse_serve.bench.kernels import Result
    from sparse_serve.bench.serve import Comparison
    from sparse_serve.runtime.errors import BenchError

DTYPES = ("bfloat16", "float16", "float32")

_HELP = {
    "kernels": "time sparse linear layers against dense ones",
    "serve": "time a sparse model against its dense base, with vLLM's own serving benchmark",
}
_SERVE_EPILOG = """What follows -- goes to every server of vLLM: ... --sparse DIR -- --enforce-eager.
Without --peers the two models are served one after the other, never at once, and change places from round to round.
With them every server is started once, and in a round one after the other is under load."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve bench kernels` and `sparse-serve bench serve`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_kernels(kinds.add_parser("kernels", help=_HELP["kernels"], description=_HELP["kernels"]))
    _add_serve(kinds.add_parser("serve", help=_HELP["serve"], description=_HELP["serve"], epilog=_SERVE_EPILOG))


def main(args: argparse.Namespace) -> int:
    """Measure, print tables, write what was asked for. Returns 0."""
    return _kernels(args) if args.kind == "kernels" else _serve(args)


def _kernels(args: argparse.Namespace) -> int:
    from maskgen.core.files import check_writable, write_json
    from sparse_serve.bench import kernels, roofline

    check_writable(args.json, args.plot)
    if args.plot:
        roofline.check(args.plot)
    progress = Console(stderr=True)
    request = from_flags(kernels.KernelsRequest, args)
    results = kernels.run(
        request,
        lambda result: progress.print(
            f"{result.out_features}x{result.in_features}, {result.tokens} tokens: {result.rounds} rounds"
        ),
        lambda error: progress.print(f"not measured: {error}", markup=False),
    )
    if args.json:  # files first, as nobody may read what is printed
        write_json(args.json, kernels.record(request, results))
    if args.plot:
        kernels.plot(request, results, args.plot)
    for at in range(0, len(results), len(request.tokens)):
        Console().print(kernels_table(results[at : at + len(request.tokens)]))
    return 0


def _serve(args: argparse.Namespace) -> int:
    if args.peers:
        return field.main(args)
    from maskgen.core.files import check_writable, write_json
    from sparse_serve.bench import serve

    _check_pair(args)
    check_writable(args.json)
    args.sparse, args.input_tokens = args.sparse[0], args.input_tokens[0]
    request = from_flags(serve.ServeRequest, args)
    failures: list[BenchError] = []
    runs = serve.run(request, Console(stderr=True).print, failures.append)
    if args.json:
        write_json(args.json, serve.record(request, runs, *failures))
    Console().print(serve_table(serve.compare(runs)))
    if failures:  # what was measured before is told first
        raise failures[0]
    return 0


def _check_pair(args: argparse.Namespace) -> None:
    """Raise `SettingsError` for what only a bench with peers can do."""
    from sparse_serve.runtime.errors import SettingsError

    extra = {
        "--sparse": len(args.sparse) > 1,
        "--input-tokens": len(args.input_tokens) > 1,
        "--threads": args.threads is not None,
        "--keep-peers": args.keep_peers is not None,
        "--int8-activations": args.int8_activations,
        "--int8-head": args.int8_head,
    }
    for flag, is_given in extra.items():
        if is_given:
            value = getattr(args, flag.strip("-").replace("-", "_"))
            given = value if isinstance(value, list) else [] if value is True else [value]
            shown = " ".join(map(str, [flag, *given]))
            raise SettingsError(f"{shown}: only with --peers; add them, or give one value less")


def kernels_table(results: Sequence[Result]) -> Table:
    """One shape: a section per number of tokens, a line per candidate; speedups below 1 in red.

    `dense` is the faster dense layer in the activations' dtype, `W8A8` and `W4A16` or `W4A8` are vLLM's quantised ones.
    """
    shown = Table(title=f"{results[0].out_features} x {results[0].in_features}", box=box.SIMPLE_HEAD)
    from sparse_serve.bench.kernels import DENSE

    peers = [peer for peer in results[0].speedup_over if peer not in DENSE]
    over = [f"over\n{peer.split()[-1]}" for peer in peers]
    for name in ("tokens", "layer", "ms", "over\ndense", *over, "of byte\nlimit"):
        shown.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name != "layer", overflow="fold")
    for result in results:
        first = str(result.tokens)
        for name, median_s in result.median_s.items():
            ratios = [of.get(name) for of in (result.speedup, *(result.speedup_over[peer] for peer in peers))]
            limit = result.of_byte_limit.get(name)
            share = "" if limit is None else f"{100 * limit:.0f} %"
            shown.add_row(first, name, f"{median_s * 1e3:.3f}", *map(_ratio, ratios), share)
            first = ""
        shown.add_section()
    return shown


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"[red]{value:.2f}x[/red]" if value < 1 else f"{value:.2f}x"


def serve_table(compared: Sequence[Comparison]) -> Table:
    """A section per number of clients; where sparse is worse its ratio is red."""
    rounds = len(compared[0].ratios)
    title = f"a sparse model served against its dense base (rounds: {rounds})"
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("clients", "", "dense", "sparse", "better", "by round"):
        shown.add_column(name, justify="left" if name == "" else "right", no_wrap=name != "", overflow="fold")
    seen: set[int] = set()
    for row, after in zip(compared, [*compared[1:], None], strict=True):
        is_first = row.clients not in seen
        seen.add(row.clients)
        ratio = f"{row.ratio:.2f}x"
        lowest, highest = min(row.ratios), max(row.ratios)
        shown.add_row(
            str(row.clients) if is_first else "",
            row.metric.title,
            f"{row.dense:.1f}",
            f"{row.sparse:.1f}",
            f"[red]{ratio}[/red]" if row.ratio < 1 else ratio,
            f"{lowest:.2f} to {highest:.2f}" if rounds > 1 else "",
            end_section=after is None or after.clients != row.clients,
        )
    return shown


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    shown = " (default: %(default)s)"
    shapes = "layers to time, out features x in features" + shown
    add("--shapes", type=_shapes, default="14336x4096,4096x4096", metavar="OxI,...", help=shapes)
    add("--tokens", type=_wholes, default="1,4,16,64,256", metavar="N,...", help="tokens in a call" + shown)
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of activations and dense weights" + shown)
    add("--threads", type=_whole, metavar="N", help="threads to compute with (default: all cores)")
    add("--seconds", type=float, default=5.0, metavar="S", help="time for each shape and number of tokens" + shown)
    add("--with-reference", action="store_true", help="time the slow reference kernel too")
    add("--plot", type=Path, metavar="FILE", help="also draw a roofline: .svg, .png or .pdf")
    _add_json(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    shown = " (default: %(default)s)"
    add("--dense", type=Path, required=True, metavar="DIR", help="the dense model")
    sparse = "a sparse checkpoint of the same model; with --peers, several if you like"
    add("--sparse", type=Path, required=True, nargs="+", metavar="DIR", help=sparse)
    peers = (
        f"also serve what a user would pick instead, in its own server: {', '.join(field.PEERS)} (default: none; the "
        "dense model is served as the sparse one is)"
    )
    add("--peers", nargs="+", choices=field.PEERS, default=[], metavar="PEER", help=peers)
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="both models compute in it" + shown)
    add("--clients", type=_wholes, default="1,8", metavar="N,...", help="clients at a time; each N is a load" + shown)
    add("--requests", type=_whole, default=4, metavar="N", help="requests of each client" + shown)
    lengths = "length of a prompt; with --peers, time to the first token is measured at several" + shown
    add("--input-tokens", type=_wholes, default="128", metavar="N,...", help=lengths)
    add("--output-tokens", type=_two_or_more, default=128, metavar="N", help="tokens generated per request" + shown)
    add("--rounds", type=_whole, default=3, metavar="N", help="how often each model is served" + shown)
    add("--threads", type=_whole, metavar="N", help="with --peers: threads of every server (default: all cores)")
    keep = "with --peers: where what they are made into stays, for another time (default: removed)"
    add("--keep-peers", type=Path, metavar="DIR", help=keep)
    rounded = "with --peers: ours with int8 or int4 values are served a second time, with activations rounded to int8"
    add("--int8-activations", action="store_true", help=rounded)
    head = "with --int8-activations: those that are served a second time have the output layer (lm_head) in int8, too"
    add("--int8-head", action="store_true", help=head)
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
