"""The command line: `sparse-serve serve | generate | bench | tune | doctor | gate | vllm`.

Each verb is the file of its name in this folder, with `add_arguments(parser)` and `main(args) -> exit code`. It is
imported when it is used, so that `--help` answers in a fraction of a second. What follows `vllm` is vLLM's to read.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from maskgen.core.errors import SparseError
from maskgen.core.failures import drop_output, explained
from sparse_serve.runtime import packages

_VERBS = {
    "serve": "serve a checkpoint over HTTP (OpenAI API) and gRPC",
    "generate": "send one prompt to a running server over gRPC",
    "bench": "time sparse layers and models against dense ones on this machine",
    "tune": "measure which kernel is fastest for each layer, and keep it for the server",
    "doctor": "check a checkpoint: are its masks intact, which kernels serve it, is it faster and smaller here; "
    "without one, check what is installed",
    "gate": "decide whether a sparse checkpoint may replace its dense base: quality, parity, memory",
    "vllm": "run vLLM's own command line, which `vllm` of its CPU build cannot",
}
_TAKES_VLLMS_FLAGS = ("serve", "vllm")
_VLLMS = "vllm"
_USES_VLLMS_LAYERS = ("bench", "tune", "doctor")
_NEEDS_NO_ENGINE = ("generate",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 fine, 2 wrong usage or input, 130 interrupted, 141 nobody reads the output
    any more; 1 if the engine died (serve), a gate did not pass, or a dense model would be faster somewhere (doctor)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] != [_VLLMS]:  # which prints its log itself
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    try:
        code = _run(arguments)
        with explained("standard output"):
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop_output()
        return 141
    except (SparseError, OSError) as error:
        print(f"sparse-serve: error: {error}", file=sys.stderr)
        drop_output()
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb not in _VERBS:
        _top_parser().parse_args(arguments or ["--help"])
        return 0
    if verb in _USES_VLLMS_LAYERS:
        logging.getLogger("vllm").setLevel(logging.ERROR)  # what it logs on the way would stand between the tables
    try:
        return _run_verb(verb, arguments[1:])
    except ModuleNotFoundError as error:
        known = packages.explain(error, verb not in _NEEDS_NO_ENGINE)
        if known is None:
            raise
        raise known from None


def _run_verb(verb: str, arguments: list[str]) -> int:
    module = importlib.import_module(f"sparse_serve.cli.{verb}")
    if verb == _VLLMS:
        return int(module.main(arguments))
    parser = argparse.ArgumentParser(prog=f"sparse-serve {verb}", description=_VERBS[verb], allow_abbrev=False)
    module.add_arguments(parser)
    args, others = parser.parse_known_args(arguments)
    args.others = others
    if others and verb not in _TAKES_VLLMS_FLAGS:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    with explained():
        return int(module.main(args))


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse-serve", description="Serve N:M sparse language models on vLLM.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, description in _VERBS.items():
        verbs.add_parser(name, help=description)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
