"""The `maskgen` command: parse arguments, run one verb, turn errors into one line and an exit code.

Exit codes: 0 done, 2 something the user can fix (one line on stderr says what), 130 interrupted, 1 nobody reads the
output any more (`maskgen inspect DIR | head`). Anything else is a bug in maskgen and ends in a traceback. What decides
a result lives in the recipe; flags are about files and machines. torch and transformers are imported by the verb that
needs them, so `--help` is immediate.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys

from maskgen.api import requests
from maskgen.api.requests import Request
from maskgen.cli.arguments import SHORTER, add_verbs
from maskgen.core.errors import SparseError
from maskgen.core.failures import drop_output, explained

_EXAMPLES = """\
examples:
  maskgen demo --out demo                                     a small chat model and text to try everything on
  maskgen run sparsegpt --model demo/model --data demo/calibration.txt --out demo/sparse
  maskgen run best-effort --model demo/model --data demo/calibration.txt demo/conversations.jsonl --out demo/trained
  maskgen eval demo/sparse --data demo/heldout/*.txt          perplexity, protocol stated
  maskgen eval demo/sparse --data demo/heldout/*.txt --against demo/model    and how far it is from dense
  maskgen inspect demo/sparse                                 what is stored, layer by layer
"""

_FIELDS = {
    name
    for kind in vars(requests).values()
    if isinstance(kind, type) and issubclass(kind, Request)
    for name in kind.model_fields
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="maskgen: %(levelname)s: %(message)s")
    try:
        _run(args)
    except KeyboardInterrupt:
        hint = "; the same command goes on from what is done" if args.verb == "run" else ""
        print(f"maskgen: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        drop_output()
        return 1
    except (SparseError, OSError) as error:
        print(f"maskgen: error: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        drop_output()
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    from maskgen.cli import verbs

    with explained():
        verbs.VERBS[args.verb](args)
    with explained("standard output"):
        sys.stdout.flush()


def in_flags(message: str) -> str:
    """A message of the Python interface, in which `micro_batch` is a field, with --micro-batch in its place."""

    def flag(found: re.Match[str]) -> str:
        name = found[1]
        return SHORTER.get(name, "--" + name.replace("_", "-")) if name in _FIELDS else found[0]

    return re.sub(r"`(\w+)`", flag, message)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="maskgen",
        description="Prune language models to N:M patterns and write checkpoints that store only what is left.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_verbs(verbs)
    return parser
