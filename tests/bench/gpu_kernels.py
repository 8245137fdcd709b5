"""Is a 2:4 linear layer faster than the dense one on this GPU? One transformer block, at every number of tokens.

    python -m tests.bench.gpu_kernels [--out DIR] [--tokens 1,16,...] [--shapes qkv=6144x4096,...]

For each shape and number of tokens the candidates (torch's dense linear in bfloat16, and the GPU kernels that do not
refuse, `skinny` with 8-bit and int4 values too) are captured in CUDA graphs, as a server runs them, and the graphs are
replayed in turn; a time is the median replay over its calls. A candidate has several copies of its weight and a graph
goes through all of them, so that no call finds its weight in the L2 cache: together they are more than three times as
large. A candidate that cannot be captured or is wrong is reported with its error, never left out silently. `cusparselt`
makes codes bfloat16 numbers and has no row for them: the work is the same.

Every shape is measured in a process of its own (`gpu_measure`), and the JSON file is written after each: a crash costs
what was not measured yet. A shape whose process died is tried again without the candidate that was at work; what that
one was measured at before stays, so its times and the dense layer's may be of two processes.

At a few numbers of tokens the clock on the wall times the same calls made one by one by the host, and in a replayed
graph. What the first takes longer is the host's work; for `cusparselt` that is mostly the library's plan, which torch
makes anew in every call, and dense and `skinny` show what it takes without one.

Standard output is short and ends with the tables; the JSON file has every time. The floor of a decode step is the bytes
of the weight over the bandwidth of the memory, which a large copy measures last.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maskgen.core.files import read_json, write_json
from sparse_serve.runtime.machine import version
from tests.bench.gpu_kernels_table import lines
from tests.bench.gpu_measure import DENSE_FP8, KERNELS

SHAPES = "qkv=6144x4096,o=4096x4096,gate_up=28672x4096,down=4096x14336"
TOKENS = "1,4,8,16,32,64,128,512,2048,8192"
PACKAGES = ("torch", "triton", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12", "transformers")
MEASURE = (sys.executable, "-m", "tests.bench.gpu_measure")
LIMIT_S = 90.0
"""Of one try at one shape."""
STARTING = "starting"
"""Who crashed, if nothing was written yet."""


def main() -> int:
    """Measure everything, write the JSON, print the table. 1 if there is no GPU or a candidate failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--shapes", default=SHAPES, metavar="NAME=OxI,...")
    parser.add_argument("--tokens", default=TOKENS, metavar="N,...")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        say("error: no CUDA device here")
        return 1
    stamp, gpu = f"{datetime.now(UTC):%Y%m%d-%H%M%S}", torch.cuda.get_device_name().replace(" ", "-").lower()
    path = args.out / f"gpu-kernels--block-bfloat16--{gpu}--{stamp}.json"
    results: dict[str, Any] = {"machine": machine(), "shapes": {}}
    for name, size in (shape.split("=") for shape in args.shapes.split(",")):
        results["shapes"][name] = measure(size, args.tokens)
        write_json(path, results)
        sys.stderr.write(f"measured {name} {size}\n")
    results["copy_bytes_per_s"] = float(probe("copy_bandwidth") or "nan")
    results["machine"]["cusparselt_alpha_per_row"] = probe("alpha_per_row") or "crashed"
    write_json(path, results)
    for line in (str(path), *lines(results)):
        say(line)
    return 1 if any(shape["failed"] for shape in results["shapes"].values()) else 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    properties = torch.cuda.get_device_properties(0)
    git = shutil.which("git")
    head = [git, "rev-parse", "HEAD"] if git else ["true"]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "versions": {"cuda": torch.version.cuda, **{name: version(name) for name in PACKAGES}},
    }


def measure(size: str, tokens: str, command: Sequence[str] = MEASURE) -> dict[str, Any]:
    """What `command` (`gpu_measure`) found of one shape, all its tries together; who crashed one is in `failed`."""
    found: dict[str, Any] = {"failed": {}, "bytes": {}, "graph_s": {}, "wall_s": {}, "splits_s": {}}
    crashed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while True:
            file = Path(folder) / f"{len(crashed)}.json"  # a try that dies at its start must not show the last one's
            ended = run([*command, size, "--to", str(file), "--tokens", tokens, "--without", ",".join(crashed)])
            latest = read_json(file) if file.exists() else {}
            culprit = latest.pop("doing", STARTING)
            found = _merged(found, latest)
            if ended is None:
                break
            can_do_without = culprit in (*KERNELS, DENSE_FP8) and culprit not in crashed
            crashed[culprit] = ended
            if not can_do_without:
                break
    for table in ("graph_s", "wall_s"):
        found[table] = _by_number(found[table])
    found["splits_s"] = {name: _by_number(counts) for name, counts in found["splits_s"].items()}
    found["failed"].update(crashed)
    return found


def _merged(old: Any, new: Any) -> Any:
    """`new`, and what only `old` has, in dictionaries within dictionaries too."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _by_number(table: dict[str, Any]) -> dict[int, Any]:
    """Keys of JSON are text."""
    return {int(count): table[count] for count in sorted(table, key=int)}


def run(command: list[str]) -> str | None:
    """None, or how the process died."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT_S:.0f} s"
    lines = done.stderr.strip().splitlines() or [""]
    return f"its process ended with {done.returncode}: {lines[-1]}" if done.returncode else None


def probe(name: str) -> str | None:
    """What a function of `gpu_measure` returns, in a process of its own, as text; None if that died or hung."""
    code = f"from tests.bench import gpu_measure; print(gpu_measure.{name}())"
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    raise SystemExit(main())
