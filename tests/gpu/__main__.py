"""`python -m tests.gpu [--out DIR]`: test the kernels on this GPU, then time them, in under five minutes.

Every stage is a process of its own with a limit, so a crash or a hang costs one stage, and what it wrote before stays.
It needs a Python with torch, triton, numpy, safetensors and pytest; neither make nor pydantic nor vllm. Tests share the
GPU between processes where pytest-xdist is there. Exits with 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

BUDGET_S = 285.0
_PYTEST = (sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rfE", "-p", "no:cacheprovider")


class Stage(NamedTuple):
    """A command, its limit in seconds, and whether it may fill the user's cache with what it measures."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    is_alone: bool = True


def main() -> int:
    """Run the stages; the last lines say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the results (default: tests/bench/results)")
    args = parser.parse_args()
    began_s, ends = time.monotonic(), []
    with tempfile.TemporaryDirectory() as cache:
        for stage in stages(args.out):
            left_s = BUDGET_S - (time.monotonic() - began_s)
            env = os.environ if stage.is_alone else {**os.environ, "XDG_CACHE_HOME": cache}
            at_s = time.monotonic()
            status = run(stage, min(stage.limit_s, left_s), dict(env))
            ends.append((stage.name, status, time.monotonic() - at_s))
            if stage.name == "card" and status != "ok":
                break
    for name, status, took_s in ends:
        sys.stdout.write(f"{name}: {status}, {took_s:.0f} s\n")
    return int(any(status != "ok" for _, status, _ in ends))


def stages(out: Path | None) -> list[Stage]:
    """In order of what is most worth knowing. Algorithms found while processes share the GPU are not kept."""
    together = [["-n", str(count)] if find_spec("xdist") else [] for count in (6, 3)]
    results = () if out is None else ("--out", str(out))
    return [
        Stage("card", ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv"), 20),
        Stage("smoke", (*_PYTEST, "-x", "-k", "skinny and equals_dense and dtype1 and 4112"), 60, False),
        Stage("skinny", (*_PYTEST, *together[0], "-k", "skinny"), 120, False),
        Stage("others", (*_PYTEST, *together[1], "-k", "not skinny"), 90, False),
        Stage("speed", (sys.executable, "-m", "tests.bench.gpu_kernels", *results), 160),
    ]


def run(stage: Stage, limit_s: float, env: dict[str, str]) -> str:
    """`ok`, or how it ended. Its output is this process's."""
    sys.stdout.write(f"== {stage.name}\n")
    sys.stdout.flush()
    if limit_s < 5:
        return "no time left"
    try:
        status = subprocess.run(stage.command, env=env, check=False, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return f"killed after {limit_s:.0f} s"
    except FileNotFoundError as error:
        return f"failed: {error}"
    return "ok" if status == 0 else f"failed with {status}"


if __name__ == "__main__":
    raise SystemExit(main())
