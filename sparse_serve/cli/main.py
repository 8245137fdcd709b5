"""The command line: `sparse-serve serve | generate | bench | tune | doctor | gate`.

A verb's module is imported when the verb is used, so that `--help` answers in a fraction of a second.
"""

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from maskgen.core.errors import SparseError
from sparse_serve.runtime import processes

processes.follow()  # vLLM's spawned processes import this module before anything of vLLM

_VERBS = {
    "serve": ("sparse_serve.cli.main", "serve a checkpoint over HTTP (OpenAI API) and gRPC"),
    "generate": ("sparse_serve.cli.generate", "send one prompt to a running server over gRPC"),
    "bench": ("sparse_serve.bench.flags", "time sparse layers and models against dense ones on this machine"),
    "tune": ("sparse_serve.cli.tune", "measure which kernel is best for each layer, and remember it for the server"),
    "doctor": (
        "sparse_serve.cli.doctor",
        "is a checkpoint sound, which kernels serve it, is it faster and smaller here?",
    ),
    "gate": ("sparse_serve.gate.run", "prove that a sparse checkpoint is good enough to replace its dense base"),
}
_TOOLS = ("bench", "tune", "doctor")
_SERVE_EPILOG = """MODEL comes first. Every flag of `vllm serve` is accepted too and handed to vLLM:
--max-model-len 4096, --tensor-parallel-size 2, --dtype float32, ...
`python -m sparse_serve.cli.vllm serve --help=all` lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 fine, 2 wrong usage or input, 130 interrupted; 1 if the engine died
    (serve), a gate did not pass, or a dense model would be faster somewhere (doctor)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    try:
        return _run(arguments)
    except (SparseError, OSError) as error:
        print(f"sparse-serve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb not in _VERBS:
        _top_parser().parse_args(arguments or ["--help"])
        return 0
    if verb in _TOOLS:
        logging.getLogger("vllm").setLevel(logging.ERROR)  # they borrow a layer of vLLM's, and print tables
    module = importlib.import_module(_VERBS[verb][0])
    if verb == "serve":
        return _serve(arguments[1:])
    parser = argparse.ArgumentParser(prog=f"sparse-serve {verb}", description=_VERBS[verb][1])
    module.add_arguments(parser)
    return int(module.main(parser.parse_args(arguments[1:])))


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse-serve", description="Serve N:M sparse language models on vLLM.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, (_, description) in _VERBS.items():
        verbs.add_parser(name, help=description)
    return parser


def _serve(arguments: list[str]) -> int:
    from sparse_serve.cli import settings as settings_flags

    parser = argparse.ArgumentParser(
        prog="sparse-serve serve",
        usage="%(prog)s MODEL [flags]",
        description=_VERBS["serve"][1],
        epilog=_SERVE_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory of a sparse or dense checkpoint, or a Hugging Face model name; comes before vLLM's flags",
    )
    settings_flags.add_arguments(parser)
    ours, vllm_flags = parser.parse_known_args(arguments)
    settings = settings_flags.settings_of(ours)

    from prometheus_client import REGISTRY

    from sparse_serve.api import grpc_v1, http_openai, ops
    from sparse_serve.cli.serve import Server
    from sparse_serve.engine.vllm_engine import VllmEngine

    engine = VllmEngine(ours.model, vllm_flags, settings.drain_s)

    async def run() -> int:
        server = Server(engine, settings, [ops, http_openai, grpc_v1], REGISTRY, _announce)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        try:
            return await server.run()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                # all is closed; another signal must not turn the exit code into a failure
                signal.signal(number, signal.SIG_IGN)

    code = asyncio.run(run())
    if engine.is_loading:
        # stopped in the middle of a download, say, whose threads Python would wait for
        logging.shutdown()
        os._exit(code)
    return code


def _announce(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
