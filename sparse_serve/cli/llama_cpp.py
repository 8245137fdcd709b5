"""llama.cpp's own HTTP server as a process, to be timed.

    python -m sparse_serve.cli.llama_cpp FILE THREADS SLOTS CONTEXT

It comes with the package `xllamacpp`, which is asked for by name where it is missing. `SLOTS` requests of up to
`CONTEXT` tokens run at a time. Prompts that were seen before are read again, as by the other servers of a benchmark.
Prints what instructions the library was built with, then its address as `sparse-serve serve` does, and serves until it
is told to end.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from sparse_serve.runtime import processes


def main(arguments: Sequence[str]) -> int:
    """Serve one file until a signal ends the process; raises what the library does for a file that it cannot load."""
    processes.follow()
    import xllamacpp

    file, threads, slots, context = arguments[0], *map(int, arguments[1:])
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel, params.n_ctx = slots, slots * context
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.fit_params = params.ui = params.use_jinja = False
    server = xllamacpp.Server(params)
    print(f"built for {xllamacpp.get_system_info()}")
    print(f"\n  HTTP  {server.listening_address}\n", flush=True)
    signal.pause()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
