"""`sparse-serve gate`: may the candidate replace the base? The short form by flags, and all of it by `gate.yaml`.

    gate --dense DIR --sparse DIR --data FILE    a sparse checkpoint against its dense base
    gate init                                    write a commented gate.yaml
    gate run gate.yaml                           what the file says
    gate record gate.yaml                        measure the candidate alone, to compare later ones with
    gate explain report.json                     what a report means
    gate compare A.json B.json                   the candidate of B against that of A

Exit status: 0 pass, 1 fail, 2 wrong usage or input, 3 could not measure, 4 inconclusive.
"""

from __future__ import annotations

import argparse
import logging
import sys
from importlib import resources
from pathlib import Path
from typing import get_args

from maskgen.core.errors import OutputExistsError, SparseError
from maskgen.core.failures import drop_output, explained
from maskgen.core.files import check_writable
from sparse_serve.cli.request import from_flags
from sparse_serve.gate.config import DType, GateConfig
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.request import GateRequest, GateStep
from sparse_serve.gate.verdict import Verdict

logger = logging.getLogger(__name__)

_EXIT_STATUS = "exit status: 0 pass, 1 fail, 2 wrong usage or input, 3 could not measure, 4 inconclusive"
_FLAGS = {"window_tokens": "--window"}
"""Flags that are not called like the field of `GateRequest` they set."""

_REQUIRED = ("dense", "sparse", "data")
_HELP = {
    "init": "write a gate.yaml with every key explained",
    "run": "measure and judge what a gate.yaml says",
    "record": "measure the candidate of a gate.yaml alone, and keep that to compare later ones with",
    "explain": "say what a report.json means and what to do next",
    "compare": "judge the candidate of one report against that of an earlier one",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs, and the flags of the short form: the fields of `GateRequest`, whose defaults hold, and `--out`."""
    parser.epilog = f"The flags are the short form; `run` takes all of it from a file. {_EXIT_STATUS}"
    parser.set_defaults(usage_error=parser.error)
    _add_short_form(parser)
    verbs = parser.add_subparsers(dest="verb", metavar="init | run | record | explain | compare", required=False)
    init = verbs.add_parser("init", help=_HELP["init"], description=_HELP["init"])
    init.add_argument("file", type=Path, nargs="?", default=Path("gate.yaml"), help="(default: gate.yaml)")
    run = verbs.add_parser("run", help=_HELP["run"], description=_HELP["run"], epilog=_EXIT_STATUS)
    run.add_argument("file", type=Path, metavar="gate.yaml", help="what to measure and what is allowed")
    run.add_argument(
        "--calibrate", action="store_true", help="speed of the base against itself: what this host can tell"
    )
    _add_out(run)
    record = verbs.add_parser("record", help=_HELP["record"], description=_HELP["record"], epilog=_EXIT_STATUS)
    record.add_argument("file", type=Path, metavar="gate.yaml", help="what to measure; its base is left out")
    _add_out(record)
    explain = verbs.add_parser("explain", help=_HELP["explain"], description=_HELP["explain"])
    explain.add_argument("report", type=Path, metavar="report.json")
    compare = verbs.add_parser("compare", help=_HELP["compare"], description=_HELP["compare"], epilog=_EXIT_STATUS)
    compare.add_argument("earlier", type=Path, metavar="A.json", help="report of the earlier one")
    compare.add_argument("later", type=Path, metavar="B.json", help="report of the later one; its limits hold")
    _add_out(compare, "comparison")


def _add_out(parser: argparse.ArgumentParser, default: str = "gate") -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help="where reports are written (default: %(default)s)",
    )


def _add_short_form(parser: argparse.ArgumentParser) -> None:
    defaults = {name: field.default for name, field in GateRequest.model_fields.items()}
    add = parser.add_argument
    add("--dense", type=Path, metavar="DIR", help="the dense model")
    add("--sparse", type=Path, metavar="DIR", help="the sparse checkpoint made from it")
    add("--data", type=Path, metavar="FILE", help="held-out text: a file that `maskgen eval` reads")
    _add_out(parser)
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
    try:
        with explained():
            return _main(args)
    except (SparseError, OSError):
        raise
    except Exception:  # exit status 1 means a measured regression, and Python would use it for a bug
        logger.exception("the gate has failed")
        return Verdict.ERROR.exit_code


def _main(args: argparse.Namespace) -> int:
    if args.verb == "init":
        return _init(args.file)
    if args.verb == "run":
        config = GateConfig.load(args.file)
        return _run(config.calibration() if args.calibrate else config, args.out)
    if args.verb == "record":
        return _run(GateConfig.load(args.file).recording(), args.out)
    if args.verb in ("explain", "compare"):
        return _read(args)
    missing = [f"--{name}" for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        args.usage_error(f"the following arguments are required: {', '.join(missing)}")
    return _run(from_flags(GateRequest, args, _FLAGS), args.out)


def _init(file: Path) -> int:
    text = (resources.files("sparse_serve.gate") / "gate.yaml").read_text("utf-8")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise OutputExistsError(f"{file}: is there already; remove it, or give another name") from None
    print(f"written: {file}; next: edit it, then sparse-serve gate run {file}")
    return 0


def _read(args: argparse.Namespace) -> int:
    from sparse_serve.gate import baseline, explain, report_file

    if args.verb == "compare":
        written = GateReport.files(args.out)
        for read in (args.earlier, args.later):
            if read.resolve() in [path.resolve() for path in written]:
                raise OutputExistsError(f"{read}: would be overwritten; give another --out")
        check_writable(*written)
        stored = report_file.load(args.earlier), report_file.load(args.later)
        GateReport.remove(args.out)
        return _finish(baseline.compare(*stored), args.out)
    print("\n".join(explain.explain(report_file.load(args.report))))
    return 0


def _run(asked: GateConfig | GateRequest, out: Path) -> int:
    from sparse_serve.gate import plan, runner  # torch, which --help does not need

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every request
    check_writable(*GateReport.files(out))
    todo = plan.plan(asked)
    GateReport.remove(out)  # should this process be killed, nobody is to find an old verdict
    try:
        with explained():
            report = runner.run(todo, on_step=_show)
    except SparseError as error:
        print(f"sparse-serve: error: {error}", file=sys.stderr)
        report = runner.not_measured(todo, str(error))
    except Exception as error:  # a bug, which is no verdict either
        logger.exception("the gate could not measure")
        report = runner.not_measured(todo, f"{type(error).__name__}: {error}")
    return _finish(report, out)


def _finish(report: GateReport, out: Path) -> int:
    """Write and print a report. One that cannot be kept is an error, whatever it says."""
    try:
        with explained("standard output"):
            try:
                written = report.write(out)  # first, as nobody may read what is printed
            finally:
                print(report.to_markdown(), end="", flush=True)
            print(f"\nwritten: {', '.join(map(str, written))}", flush=True)
    except SparseError as error:
        print(f"sparse-serve: error: {error}", file=sys.stderr)
        drop_output()
        return Verdict.ERROR.exit_code
    return report.verdict.exit_code


def _show(step: GateStep) -> None:
    print(f"gate {step.number}/{step.steps}: {step.what}", file=sys.stderr, flush=True)
