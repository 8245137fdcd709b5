"""Is a 2:4 linear layer faster than the dense one on this GPU? One transformer block, at every number of tokens.

    python -m tests.bench.gpu_kernels [--out DIR] [--tokens 1,16,...] [--shapes qkv=6144x4096,...]

For each shape and number of tokens the contenders (torch's dense linear in bfloat16, and the GPU kernels that do not
refuse, `skinny` with 8-bit values too) are captured in CUDA graphs, as a server runs them, and the graphs are replayed
in turn; a time is the median replay over its calls. A contender has several copies of its weight and a graph goes
through all of them, so that no call finds its weight in the L2 cache: together they are more than three times as large.
A contender that cannot be captured or is wrong is reported with its error, never left out silently. `cusparselt` makes
8-bit values bfloat16 ones and has no row for them: the work is the same.

At a few numbers of tokens the clock on the wall times the same calls made one by one by the host, and in a replayed
graph. What the first takes longer is the host's work; for `cusparselt` that is mostly the library's plan, which torch
makes anew in every call, and dense and `skinny` show what it takes without one.

Standard output is short and ends with the tables; the JSON file has every time. The floor of a decode step is the bytes
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
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from maskgen.core.values import FLOAT, FP8, INT8
from sparse_serve.errors import KernelError
from sparse_serve.kernels import LinearSpec, choose, skinny
from tests.bench.gpu_kernels_table import DENSE, lines

PATTERN = NMPattern(2, 4)
GPU = "cuda"
SHAPES = "qkv=6144x4096,o=4096x4096,gate_up=28672x4096,down=4096x14336"
TOKENS = "1,4,8,16,32,64,128,512,2048,8192"
KERNELS = {
    "skinny": ("skinny", FLOAT),
    "skinny int8": ("skinny", INT8),
    "skinny fp8": ("skinny", FP8),
    "cusparselt": ("cusparselt", FLOAT),
}
"""Contenders of the dense layer: the kernel, and how its values are stored."""
MOST_TOKENS = {"skinny": 512}
"""Beyond this a kernel is only slow."""
SPLIT_TOKENS, SPLITS = (1, 8, 16, 32), [(wide, warps) for wide in (1, 2) for warps in (4, 8, 16)]
SPLIT_CONTENDERS = ("skinny", "skinny int8")
WALL_TOKENS, WALL_ROUNDS, WALL_REPEATS = (1, 64, 512), 9, 8
REPLAYS, L2_TIMES = 25, 3.2

Call = Callable[[Tensor], Tensor]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """One contender: a call and, for a kernel, its tensors for each copy of the weight; the weight it stands for."""

    calls: list[Call]
    exact_OI: Tensor
    nbytes: int
    tensors: list[dict[str, Tensor]]


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
    for line in (str(path), *lines(results)):
        say(line)
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
        "cusparselt_alpha_per_row": alpha_per_row(),
    }


def alpha_per_row() -> str:
    """Whether cuSPARSELt takes one alpha for each row of a bfloat16 weight, which 8-bit values could make use of."""
    eye, alpha = torch.eye(64, device=GPU).bfloat16(), torch.arange(1.0, 65.0, device=GPU)
    try:
        y_TO = torch._cslt_sparse_mm(torch._cslt_compress(eye), eye.t(), alpha=alpha, transpose_result=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "right" if torch.equal(y_TO.float(), alpha.diag()) else "wrong"


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, counting those read and those written."""
    source = torch.randn(1 << 29, device=GPU)
    target = torch.empty_like(source)
    seconds = statistics.median(replay([capture(lambda: target.copy_(source))], 20)[0])
    return 2 * source.nbytes / seconds


def measure_shape(rows: int, columns: int, tokens: list[int]) -> dict[str, Any]:
    """Median seconds per call of every contender at every number of tokens, by the wall too, and of skinny's splits."""
    weight_OI = torch.randn(rows, columns, device=GPU).mul_(columns**-0.5).bfloat16()
    packed = PackedTensor.pack(weight_OI, PATTERN.mask_from_scores(weight_OI.float().abs()), PATTERN)
    failed: dict[str, str] = {}
    layers = {DENSE: dense_layer(packed.unpack())}
    for name, (kernel, values) in KERNELS.items():
        try:
            layers[name] = sparse_layer(kernel, packed.quantised(values))
        except (KernelError, RuntimeError) as error:
            failed[name] = str(error)
    graph_s: dict[int, dict[str, float]] = {}
    wall_s: dict[int, dict[str, tuple[float, float]]] = {}
    for count in sorted({*tokens, *WALL_TOKENS}):
        runs = ready(layers, count, columns, failed)
        if count in tokens:
            times = replay([graph for _, graph in runs.values()], REPLAYS)
            graph_s[count] = {
                name: statistics.median(t) / len(layers[name].calls) for name, t in zip(runs, times, strict=True)
            }
        if count in WALL_TOKENS:
            wall_s[count] = {
                name: (wall(eager) / len(layers[name].calls), wall(graph) / len(layers[name].calls))
                for name, (eager, graph) in runs.items()
            }
    return {
        "out_features": rows,
        "in_features": columns,
        "failed": failed,
        "bytes": {name: layer.nbytes for name, layer in layers.items()},
        "graph_s": graph_s,
        "wall_s": wall_s,
        "splits_s": {
            name: {count: splits(layers[name].tensors, count, columns) for count in SPLIT_TOKENS}
            for name in SPLIT_CONTENDERS
            if name in layers
        },
    }


def copies(nbytes: int) -> int:
    """How many copies of a weight the L2 cache cannot hold."""
    return max(2, -(-int(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size) // nbytes))


def dense_layer(weight_OI: Tensor) -> Layer:
    """torch's dense linear, once for each copy of the weight."""
    weights = [weight_OI.clone() for _ in range(copies(weight_OI.nbytes))]
    return Layer([lambda x, at=weight: dense_linear(x, at) for weight in weights], weight_OI, weight_OI.nbytes, [])


def sparse_layer(name: str, packed: PackedTensor) -> Layer:
    """A kernel, in as many copies as its tensors need."""
    kernel = choose(LinearSpec(*packed.shape, PATTERN, torch.bfloat16, GPU, packed.kind), name)
    prepared = kernel.prepare(packed)
    nbytes = sum(tensor.nbytes for tensor in prepared.values())
    tensors = [{key: tensor.clone() for key, tensor in prepared.items()} for _ in range(copies(nbytes))]
    return Layer([lambda x, at=at: kernel.linear(x, at, None) for at in tensors], packed.unpack(), nbytes, tensors)


def ready(layers: dict[str, Layer], count: int, columns: int, failed: dict[str, str]) -> dict[str, tuple[Run, Run]]:
    """Calls with all copies, by the host and as a graph, by contender; what raises or is wrong goes to `failed`."""
    x_TI = torch.randn(count, columns, device=GPU).bfloat16()
    runs: dict[str, tuple[Run, Run]] = {}
    for name, layer in layers.items():
        if count > MOST_TOKENS.get(name.split()[0], count):
            continue

        def everything(calls: list[Call] = layer.calls) -> None:
            for call in calls:
                call(x_TI)

        try:
            expected_TO = x_TI.float() @ layer.exact_OI.float().T
            off = ((layer.calls[-1](x_TI).float() - expected_TO).norm() / expected_TO.norm()).item()
            if not off < 1e-2:
                raise ValueError(f"off by {off:.1e}")
            runs[name] = everything, capture(everything)
        except Exception as error:  # whatever a compiler, a driver or a library may raise
            failed[f"{name}, {count} tokens"] = str(error)
    return runs


def splits(prepared: list[dict[str, Tensor]], count: int, columns: int) -> dict[str, float]:
    """Median seconds of one call of skinny, by strips x warps of a program: the choice that `skinny.split` makes."""
    x_TI = torch.randn(count, columns, device=GPU).bfloat16()
    runs = []
    for wide, warps in SPLITS:

        def everything(wide: int = wide, warps: int = warps) -> None:
            for at in prepared:
                skinny.skinny_linear(x_TI, at["blocks"], at["form"], at.get("scale"), None, wide, warps)

        runs.append(capture(everything))
    times = [statistics.median(seconds) / len(prepared) for seconds in replay(runs, REPLAYS)]
    return {f"{wide}x{warps}": seconds for (wide, warps), seconds in zip(SPLITS, times, strict=True)}


def capture(run: Run) -> Run:
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


def wall(run: Run) -> float:
    """Median seconds of `run` by the clock on the wall, the GPU's end included, `WALL_REPEATS` in a row at a time."""
    seconds = []
    for _ in range(WALL_ROUNDS + 1):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(WALL_REPEATS):
            run()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began_s) / WALL_REPEATS)
    return statistics.median(seconds[1:])


def replay(runs: list[Run], times: int) -> list[list[float]]:
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


if __name__ == "__main__":
    raise SystemExit(main())
