"""What each `maskgen` verb does: make a request of the arguments, call the Python interface, show what came out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TypeVar

from maskgen.api import converting, measuring, pruning, quantising
from maskgen.api.pruning import LearnResult, PruneResult
from maskgen.api.requests import (
    CompressRequest,
    ConvertRequest,
    DecompressRequest,
    DemoRequest,
    EvaluateRequest,
    InspectRequest,
    LearnRequest,
    PermuteRequest,
    QuantiseRequest,
    ReportRequest,
    Request,
)
from maskgen.cli import display, measured
from maskgen.cli.progress import megabytes, shown_progress
from maskgen.core.errors import RequestError
from maskgen.core.files import check_writable, write_json
from maskgen.core.quality import QUALITY_FILE, UNKNOWN
from maskgen.hf import model

_Request = TypeVar("_Request", bound=Request)


def request(kind: type[_Request], args: argparse.Namespace) -> _Request:
    """A request of the flags that were typed; its other fields keep their defaults."""
    return kind(**{name: value for name, value in vars(args).items() if name in kind.model_fields})


def run(args: argparse.Namespace) -> None:
    """Recipe + dense model + text -> checkpoint."""
    model.quiet()
    with shown_progress() as show:
        result = pruning.run(request(LearnRequest, args), show)
    if result is not None:  # another process of the group speaks
        display.print_run(result)
    if isinstance(result, PruneResult | LearnResult):
        measured.print_quality(result.quality)


def permute(args: argparse.Namespace) -> None:
    """Dense model + text -> the same function with its neurons in another order."""
    model.quiet()
    with shown_progress() as show:
        result = converting.permute(request(PermuteRequest, args), show)
    display.print_permuted(result)


def compress(args: argparse.Namespace) -> None:
    """Dense model + masks -> sparse checkpoint."""
    model.quiet()
    with shown_progress() as show:
        result = converting.compress(request(CompressRequest, args), show)
    display.print_compressed(result.out, result.written)


def convert(args: argparse.Namespace) -> None:
    """Sparse model of another tool -> sparse checkpoint."""
    model.quiet()
    with shown_progress() as show:
        result = converting.convert(request(ConvertRequest, args), show)
    display.print_converted(result)


def quantise(args: argparse.Namespace) -> None:
    """Sparse checkpoint with float values -> one with 8-bit or 4-bit values."""
    model.quiet()
    with shown_progress() as show:
        result = quantising.quantise(request(QuantiseRequest, args), show)
    display.print_compressed(result.out, result.written)
    if (found := result.against_float) is not None:
        display.say(
            f"codes: perplexity {found.dense_perplexity:.2f} with float values -> {found.perplexity:.2f}, "
            f"KL {found.kl:.3f} nats per token, on {found.windows} held-out windows"
        )
    if result.quality_dropped:
        display.say(f"quality: {UNKNOWN.format(result.out)} (of {args.model} it was measured with other values)")


def decompress(args: argparse.Namespace) -> None:
    """Sparse checkpoint or GGUF file -> dense model, with zeros, or with corrections folded in."""
    model.quiet()
    result = converting.decompress(request(DecompressRequest, args))
    display.say(f"wrote {result.out}: {megabytes(result.total_bytes)}")
    if result.folded:
        display.say("  its corrections are folded into the weights, so these are no longer sparse")


def inspect(args: argparse.Namespace) -> None:
    """Table or JSON of what a directory holds."""
    report = measuring.inspect(request(InspectRequest, args))
    if "json" in args:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        display.print_inspect(report)
        if report.quality is not None:
            measured.print_quality(report.quality)
        elif report.compressed:
            display.say(f"quality: {UNKNOWN.format(args.model)}")


def evaluate(args: argparse.Namespace) -> None:
    """Perplexity with its protocol, and the distance from the dense model."""
    check_writable(getattr(args, "json", None), getattr(args, "windows_out", None))
    model.quiet()
    wanted = request(EvaluateRequest, args)
    if "windows_out" in args and len(wanted.data) > 1:
        raise RequestError(f"--windows-out {args.windows_out}: holds the windows of one text; give one with --data")
    with shown_progress() as show:
        result = measuring.evaluate(wanted, show)
    if "json" in args:  # files first, as nobody may read what is printed
        write_json(args.json, result.to_dict())
    if "windows_out" in args:
        write_json(args.windows_out, [asdict(window) for window in result.windows])
    measured.print_evaluated(result)
    if result.quality is not None:
        measured.print_quality(result.quality)
        display.say(f"  kept as {QUALITY_FILE} in {args.model}")


def demo(args: argparse.Namespace) -> None:
    """A chat model and text."""
    model.quiet()
    with shown_progress() as show:
        result = measuring.demo(request(DemoRequest, args), show)
    out = result.out
    texts = f"{result.calibration} {result.conversations}"
    display.say(f"demo in {out}: model, calibration.txt, conversations.jsonl, heldout/*.txt, quick.toml")
    display.say(f"next: maskgen run {result.recipe} --model {result.model} --data {texts} --out {out}/sparse")


def report(args: argparse.Namespace) -> None:
    """One page about runs."""
    result = measuring.report(request(ReportRequest, args))
    display.say(f"wrote {result.out}: {megabytes(result.total_bytes)}; open it in a browser")


VERBS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "run": run,
    "permute": permute,
    "compress": compress,
    "convert": convert,
    "quantise": quantise,
    "decompress": decompress,
    "inspect": inspect,
    "eval": evaluate,
    "demo": demo,
    "report": report,
}
