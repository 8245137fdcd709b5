"""`sparse-serve gate --dense DIR --sparse DIR --data FILE`: may the sparse model replace the dense one?

Exit status: 0 pass, 1 fail, 2 wrong usage or input, 3 could not measure, 4 inconclusive.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args

from maskgen.core.errors import SparseError
from maskgen.core.failures import explained
from maskgen.core.files import check_writable
from sparse_serve.cli.request import from_flags
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.request import DType, GateRequest, GateStep
from sparse_serve.gate.verdict import Verdict

logger = logging.getLogger(__name__)

_FLAGS = {"window_tokens": "--window"}
"""Flags that are not called like the field of `GateRequest` they set."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve gate`: the fields of `GateRequest`, whose defaults hold, and `--out`."""
    parser.epilog = "exit status: 0 pass, 1 fail, 2 wrong usage or input, 3 could not measure, 4 inconclusive"
    defaults = {name: field.default for name, field in GateRequest.model_fields.items()}
    add = parser.add_argument
    add("--dense", type=Path, required=True, metavar="DIR", help="the dense model")
    add("--sparse", type=Path, required=True, metavar="DIR", help="the sparse checkpoint made from it")
    add("--data", type=Path, required=True, metavar="FILE", help="held-out text: a file that `maskgen eval` reads")
    add("--out", type=Path, default=Path("gate"), metavar="DIR", help="where reports are written (default: gate)")
    add(
        "--max-ppl-increase",
        type=float,
        default=defaults["max_ppl_increase"],
        metavar="F",
        help="relative increase of perplexity that is allowed (default: %(default)s, which is 5%%)",
    )
    add(
        "--alpha",
        type=float,
        default=defaults["alpha"],
        help="significance level of the one-sided test of that increase (default: %(default)s)",
    )
    add(
        "--parity-tolerance",
        type=float,
        metavar="F",
        help="relative difference allowed between the perplexities that vLLM and transformers compute with the same "
        "weights (default: 0.001 in float32, 0.01 in 16 bits)",
    )
    add("--dtype", choices=get_args(DType), help="what both stacks compute in (default: the checkpoint's)")
    add(
        "--window",
        dest="window_tokens",
        type=int,
        metavar="TOKENS",
        help="length of a window (default: 2048, or half the model's context if that is less)",
    )
    add("--max-windows", type=int, metavar="N", help="measure only the first N windows (default: all)")
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each window with BOS, or do not (default: as the tokenizer does by itself)",
    )
    add("--allow-other-base", action="store_true", help="compare although --sparse was not made from --dense")


def main(args: argparse.Namespace) -> int:
    """Run the gate, print its report, write it. Returns the exit status."""
    from sparse_serve.gate import runner  # torch, which --help does not need

    check_writable(*GateReport.files(args.out))
    todo = runner.plan(from_flags(GateRequest, args, _FLAGS))
    try:
        with explained():
            report = runner.run(todo, on_step=_show)
    except SparseError as error:
        print(f"sparse-serve: error: {error}", file=sys.stderr)
        return Verdict.ERROR.exit_code
    except Exception:  # exit status 1 means a measured regression, and Python would use it for a bug
        logger.exception("the gate could not measure")
        return Verdict.ERROR.exit_code
    try:
        written = report.write(args.out)  # first, as nobody may read what is printed
    finally:
        print(report.to_markdown(), end="", flush=True)
    print(f"\nwritten: {', '.join(map(str, written))}")
    return report.verdict.exit_code


def _show(step: GateStep) -> None:
    print(f"gate {step.number}/{step.steps}: {step.what}", file=sys.stderr, flush=True)
