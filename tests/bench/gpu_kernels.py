"""Is a 2:4 linear layer faster than the dense one on this GPU? One transformer block, at every number of tokens.

    python -m tests.bench.gpu_kernels [--out DIR] [--tokens 1,16,...] [--shapes qkv=6144x4096,...]

For each shape and number of tokens the contenders (torch's dense linear, and the GPU kernels that do not refuse) are
captured in CUDA graphs, as a server runs them, and the graphs are replayed in turn; a time is the median replay over
its calls. A contender has several copies of its weight and a graph goes through all of them, so that no call finds its
weight in the L2 cache: together they are more than three times as large. A contender that cannot be captured or is
wrong is reported with its error, never left out silently.

Standard output is short and ends with the table; the JSON file has every time. The floor of a decode step is the bytes
of the weight over the bandwidth of the memory, which a large copy measures first.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from sparse_serve.errors import KernelError
from sparse_serve.kernels import LinearSpec, choose, skinny

PATTERN = NMPattern(2, 4)
GPU = "cuda"
SHAPES = "qkv=6144x4096,o=4096x4096,gate_up=28672x4096,down=4096x14336"
TOKENS = "1,4,8,16,32,64,128,512,2048,8192"
DENSE, KERNELS = "dense", ("skinny", "cusparselt")
MOST_TOKENS = {"skinny": 512}
"""Beyond this a contender is only slow."""
SPLIT_TOKENS, SPLITS = (1, 8, 16, 32), [(wide, warps) for wide in (1, 2) for warps in (4, 8, 16)]
EAGER_TOKENS = 16
REPLAYS, L2_TIMES = 25, 3.2

Call = Callable[[Tensor], Tensor]


def main() -> int:
    """Measure everything, write the JSON, print the table. 1 if there is no GPU or a contender failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--shapes", default=SHAPES, metavar="NAME=OxI,...")
    parser.add_argument("--tokens", default=TOKENS, metavar="N,...")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        say("error: no CUDA device here")
        return 1
    shapes = {name: tuple(map(int, size.split("x"))) for name, size in (s.split("=") for s in args.shapes.split(","))}
    tokens = [int(count) for count in args.tokens.split(",")]
    torch.manual_seed(0)
    results: dict[str, Any] = {"machine": machine(), "copy_bytes_per_s": copy_bandwidth(), "shapes": {}}
    for name, (rows, columns) in shapes.items():
        results["shapes"][name] = measure_shape(rows, columns, tokens)
        torch.cuda.empty_cache()
        say(f"measured {name} {rows}x{columns}", sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    stamp, gpu = f"{datetime.now(UTC):%Y%m%d-%H%M%S}", torch.cuda.get_device_name().replace(" ", "-").lower()
    path = args.out / f"gpu-kernels--block-bfloat16--{gpu}--{stamp}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    report(results, tokens, path)
    return 1 if any(shape["failed"] for shape in results["shapes"].values()) else 0


def say(line: str, stream: TextIO = sys.stdout) -> None:
    stream.write(line + "\n")
    stream.flush()


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
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version("triton") if find_spec("triton") else None,
            "cusparselt": torch.backends.cusparselt.version(),
        },
    }


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, counting those read and those written."""
    source = torch.randn(1 << 29, device=GPU)
    target = torch.empty_like(source)
    seconds = statistics.median(replay([capture(lambda: target.copy_(source))], 20)[0])
    return 2 * source.nbytes / seconds


def measure_shape(rows: int, columns: int, tokens: list[int]) -> dict[str, Any]:
    """Median seconds per call of every contender at every number of tokens, eager calls, and skinny's splits."""
    weight_OI = torch.randn(rows, columns, device=GPU).mul_(columns**-0.5).bfloat16()
    packed = PackedTensor.pack(weight_OI, PATTERN.mask_from_scores(weight_OI.float().abs()), PATTERN)
    result: dict[str, Any] = {"out_features": rows, "in_features": columns, "failed": {}, "bytes": {}}
    layers: dict[str, list[Call]] = {DENSE: dense_copies(packed.unpack())}
    result["bytes"][DENSE] = weight_OI.nbytes
    prepared: dict[str, list[dict[str, Tensor]]] = {}
    for name in KERNELS:
        try:
            kernel = choose(LinearSpec(rows, columns, PATTERN, torch.bfloat16, GPU), name)
            prepared[name] = tensor_copies(kernel.prepare(packed))
        except (KernelError, RuntimeError) as error:
            result["failed"][name] = str(error)
            continue
        layers[name] = [lambda x, run=kernel.linear, at=at: run(x, at, None) for at in prepared[name]]
        result["bytes"][name] = sum(tensor.nbytes for tensor in prepared[name][0].values())
    exact = packed.unpack()
    result["graph_s"] = {
        count: interleaved(layers, count, columns, exact, result["failed"], graph=True) for count in tokens
    }
    result["eager_s"] = interleaved(layers, EAGER_TOKENS, columns, exact, result["failed"], graph=False)
    if "skinny" in prepared:
        result["splits_s"] = {count: splits(prepared["skinny"], count, columns) for count in SPLIT_TOKENS}
    return result


def copies(nbytes: int) -> int:
    """How many copies of a weight the L2 cache cannot hold."""
    return max(2, -(-int(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size) // nbytes))


def dense_copies(weight_OI: Tensor) -> list[Call]:
    """torch's dense linear, once for each copy of the weight."""
    weights = [weight_OI.clone() for _ in range(copies(weight_OI.nbytes))]
    return [lambda x, at=weight: dense_linear(x, at) for weight in weights]


def tensor_copies(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of a kernel, in as many copies."""
    count = copies(sum(tensor.nbytes for tensor in tensors.values()))
    return [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count)]


def interleaved(
    layers: dict[str, list[Call]], count: int, columns: int, exact_OI: Tensor, failed: dict[str, str], graph: bool
) -> dict[str, float]:
    """Median seconds of one call by contender; what raises or is wrong goes to `failed` instead."""
    x_TI = torch.randn(count, columns, device=GPU).bfloat16()
    expected_TO = x_TI.float() @ exact_OI.float().T
    runs: dict[str, Callable[[], Any]] = {}
    for name, calls in layers.items():
        if count > MOST_TOKENS.get(name, count):
            continue

        def everything(calls: list[Call] = calls) -> None:
            for call in calls:
                call(x_TI)

        try:
            off = ((calls[-1](x_TI).float() - expected_TO).norm() / expected_TO.norm()).item()
            if not off < 1e-2:
                raise ValueError(f"off by {off:.1e}")
            runs[name] = capture(everything) if graph else everything
        except Exception as error:  # whatever a compiler, a driver or a library may raise
            failed[f"{name}, {count} tokens"] = str(error)
    times = replay(list(runs.values()), REPLAYS)
    return {name: statistics.median(t) / len(layers[name]) for name, t in zip(runs, times, strict=True)}


def splits(prepared: list[dict[str, Tensor]], count: int, columns: int) -> dict[str, float]:
    """Median seconds of one call of skinny, by strips x warps of a program: the choice that `skinny.split` makes."""
    x_TI = torch.randn(count, columns, device=GPU).bfloat16()
    runs = []
    for wide, warps in SPLITS:

        def everything(wide: int = wide, warps: int = warps) -> None:
            for at in prepared:
                skinny.skinny_linear(x_TI, at["blocks"], at["form"], None, wide, warps)

        runs.append(capture(everything))
    times = [statistics.median(seconds) / len(prepared) for seconds in replay(runs, REPLAYS)]
    return {f"{wide}x{warps}": seconds for (wide, warps), seconds in zip(SPLITS, times, strict=True)}


def capture(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a CUDA graph. It runs twice before, for what happens on a first call only."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay  # type: ignore[no-any-return]


def replay(runs: list[Callable[[], Any]], times: int) -> list[list[float]]:
    """Seconds of each of `runs`, in turn, `times` times over, after three that do not count."""
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(times + 3):
        for run, mine in zip(runs, events, strict=True):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            run()
            ended.record()
            mine.append((began, ended))
        torch.cuda.synchronize()
    return [[began.elapsed_time(ended) / 1e3 for began, ended in mine[3:]] for mine in events]


def report(results: dict[str, Any], tokens: list[int], path: Path) -> None:
    """Failures, then one table: time over dense time by shape and for their sum, and what decoding reads per second."""
    shapes, copied = results["shapes"], results["copy_bytes_per_s"]
    say(f"{results['machine']['gpu']}, {results['machine']['versions']}, copy {copied / 1e12:.2f} TB/s; {path}")
    for name, shape in shapes.items():
        for what, error in shape["failed"].items():
            say(f"FAILED {name}: {what}: {error}")
        eager = ", ".join(f"{who} {seconds * 1e6:.0f}" for who, seconds in shape["eager_s"].items())
        say(f"{name}: eager calls at {EAGER_TOKENS} tokens, us: {eager}")
        for count, times in shape.get("splits_s", {}).items():
            best = min(times, key=times.__getitem__)
            strips, chunks = -(-shape["out_features"] // 16), -(-shape["in_features"] // 256)
            chosen = "{}x{}".format(*skinny.split(count, strips, chunks))
            say(
                f"  split at {count}: best {best} {times[best] * 1e6:.1f} us, chosen {chosen} {times[chosen] * 1e6:.1f}"
            )
    say("\nspeedup over dense (above 1 is faster); TB/s: bytes of the weights over time; us: the block's four linears")
    say("tokens  kernel      " + "".join(f"{name:>9}" for name in shapes) + "    block  TB/s       us  dense us")
    for count in tokens:
        for who in KERNELS:
            times = [
                (shape["graph_s"][count].get(DENSE), shape["graph_s"][count].get(who)) for shape in shapes.values()
            ]
            if any(None in pair for pair in times):
                continue
            ratios = "".join(f"{dense / mine:9.2f}" for dense, mine in times)
            dense_s, mine_s = (sum(column) for column in zip(*times, strict=True))
            speed = sum(shape["bytes"][who] for shape in shapes.values()) / mine_s / 1e12
            row = f"{dense_s / mine_s:9.2f} {speed:5.2f} {mine_s * 1e6:8.1f}  {dense_s * 1e6:8.1f}"
            say(f"{count:6}  {who:<12}{ratios}{row}")


if __name__ == "__main__":
    raise SystemExit(main())
