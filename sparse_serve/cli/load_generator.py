"""vLLM's load generator, loaded once for many runs: `python -m sparse_serve.cli.load_generator`.

Loading it takes ten times as long as a short run. A line of standard input asks for a run: a JSON object with `flags`
of `vllm bench serve` and the file of its `log`. Each run is a process of its own, forked after the imports, so that
none meets what another left; its exit status is a line of standard output. `runtime.load` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from sparse_serve.cli.vllm import answer_version


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is printed while loading is no answer
    answer_version()
    from vllm.benchmarks import serve

    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_run(serve, asked["flags"], asked["log"]))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()


def _run(serve: Any, flags: Sequence[str], log: str) -> int:
    """In the forked process: one run, with all it says in the log."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 0
    try:
        parser = FlexibleArgumentParser(prog="vllm bench serve")
        serve.add_cli_args(parser)
        serve.main(parser.parse_args(flags))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
