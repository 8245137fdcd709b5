"""One shape for `gpu_kernels`, in a process of its own: a kernel that crashes takes the whole CUDA context along.

    python -m tests.bench.gpu_measure ROWSxCOLUMNS --to FILE [--tokens 1,16,...] [--without NAME,...]

FILE is written again after every number of tokens, so what was measured before a crash is there; `doing` in it is the
candidate that was at work.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from maskgen.core.files import write_json
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, FP8, INT4, INT8
from sparse_serve.kernels import LinearSpec, choose, skinny
from sparse_serve.runtime.errors import KernelError
from tests.bench.gpu_kernels_table import DENSE

PATTERN = NMPattern(2, 4)
GPU = "cuda"
KERNELS = {
    "skinny": ("skinny", FLOAT, None),
    "skinny int8": ("skinny", INT8, None),
    "skinny fp8": ("skinny", FP8, None),
    "skinny int4": ("skinny", INT4, 128),
    "cusparselt": ("cusparselt", FLOAT, None),
}
"""Candidates of the dense layer: the kernel, how its values are stored, and how many share a scale."""
DENSE_FP8 = "dense fp8"
MOST_TOKENS = {"skinny": 512}
"""Beyond this a kernel is only slow."""
SPLIT_TOKENS, SPLITS = (1, 8, 16, 32), [(wide, warps) for wide in (1, 2, 4) for warps in (1, 2, 4, 8)]
SPLIT_CANDIDATES = ("skinny", "skinny int4")
"""A few of one kernel: each split compiles anew, and int8's have been measured (`gpu-skinny-splits--*.json`)."""
WALL_TOKENS, WALL_ROUNDS, WALL_REPEATS = (1, 64, 512), 9, 8
REPLAYS, L2_TIMES = 25, 3.2
REPLAYING = "replaying"
"""What `doing` says while all candidates take turns: whoever crashes then cannot be named."""

Call = Callable[[Tensor], Tensor]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """One candidate: a call and, for a kernel, its tensors for each copy of the weight; the weight it stands for."""

    calls: list[Call]
    exact_OI: Tensor
    nbytes: int
    tensors: list[dict[str, Tensor]]
    tolerance: float = 1e-2


class Progress:
    """What is known so far, in a file."""

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        self.path, self.found = path, found

    def doing(self, what: str) -> None:
        """Write everything, and what comes next."""
        self.found["doing"] = what
        write_json(self.path, self.found)


def main() -> None:
    """Measure one shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", metavar="ROWSxCOLUMNS")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", required=True, metavar="N,...")
    parser.add_argument("--without", default="", metavar="NAME,...")
    args = parser.parse_args()
    rows, columns = map(int, args.shape.split("x"))
    torch.manual_seed(0)
    measure_shape(rows, columns, [int(count) for count in args.tokens.split(",")], args.without.split(","), args.to)


def measure_shape(rows: int, columns: int, tokens: list[int], without: list[str], to: Path) -> None:
    """Median seconds per call of every candidate at every number of tokens, by the wall too, and of skinny's splits."""
    weight_OI = torch.randn(rows, columns, device=GPU).mul_(columns**-0.5).bfloat16()
    packed = PackedTensor.pack(weight_OI, PATTERN.mask_from_scores(weight_OI.float().abs()), PATTERN)
    failed: dict[str, str] = {}
    found: dict[str, Any] = {
        "out_features": rows, "in_features": columns, "failed": failed, "bytes": {}, "graph_s": {}, "wall_s": {},
        "splits_s": {},
    }  # fmt: skip
    progress = Progress(to, found)
    layers = {DENSE: dense_layer(packed.unpack())}
    if DENSE_FP8 not in without:
        progress.doing(DENSE_FP8)
        layers[DENSE_FP8] = dense_fp8_layer(weight_OI)
    for name, (kernel, values, group) in KERNELS.items():
        if name in without:
            continue
        progress.doing(name)
        try:
            layers[name] = sparse_layer(kernel, packed.quantised(values, group))
        except (KernelError, RuntimeError) as error:
            failed[name] = str(error)
    found["bytes"] = {name: layer.nbytes for name, layer in layers.items()}
    for count in sorted({*tokens, *WALL_TOKENS}):
        runs = ready(layers, count, columns, failed, progress)
        progress.doing(REPLAYING)
        if count in tokens:
            times = replay([graph for _, graph in runs.values()], REPLAYS)
            found["graph_s"][count] = {
                name: statistics.median(t) / len(layers[name].calls) for name, t in zip(runs, times, strict=True)
            }
        if count in WALL_TOKENS:
            found["wall_s"][count] = {
                name: (wall(eager) / len(layers[name].calls), wall(graph) / len(layers[name].calls))
                for name, (eager, graph) in runs.items()
            }
    for name in SPLIT_CANDIDATES:
        if name in layers:
            progress.doing(f"{name} splits")
            found["splits_s"][name] = {count: splits(layers[name].tensors, count, columns) for count in SPLIT_TOKENS}
    progress.doing("")


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, counting those read and those written."""
    source = torch.randn(1 << 29, device=GPU)
    target = torch.empty_like(source)
    seconds = statistics.median(replay([capture(lambda: target.copy_(source))], 20)[0])
    return 2 * source.nbytes / seconds


def alpha_per_row() -> str:
    """Whether cuSPARSELt takes one alpha for each row of a bfloat16 weight, which 8-bit values could make use of."""
    eye, alpha = torch.eye(64, device=GPU).bfloat16(), torch.arange(1.0, 65.0, device=GPU)
    try:
        y_TO = torch._cslt_sparse_mm(torch._cslt_compress(eye), eye.t(), alpha=alpha, transpose_result=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "right" if torch.equal(y_TO.float(), alpha.diag()) else "wrong"


def copies(nbytes: int) -> int:
    """How many copies of a weight the L2 cache cannot hold."""
    return max(2, -(-int(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size) // nbytes))


def dense_layer(weight_OI: Tensor) -> Layer:
    """torch's dense linear, once for each copy of the weight."""
    weights = [weight_OI.clone() for _ in range(copies(weight_OI.nbytes))]
    return Layer([lambda x, at=weight: dense_linear(x, at) for weight in weights], weight_OI, weight_OI.nbytes, [])


def dense_fp8_layer(weight_OI: Tensor) -> Layer:
    """What a user would pick instead: a dense weight in fp8, one scale a row, through torch's `_scaled_mm`.

    Activations are fp8 before the clock starts, which a served model has to pay for.
    """
    scale_O1 = weight_OI.float().abs().amax(1, keepdim=True) / 448
    codes_OI = (weight_OI.float() / scale_O1).to(torch.float8_e4m3fn)
    weights = [codes_OI.clone() for _ in range(copies(codes_OI.nbytes))]
    scale_1O = scale_O1.T.contiguous()
    cast: dict[object, tuple[Tensor, Tensor]] = {}

    def call(x_TI: Tensor, at_OI: Tensor) -> Tensor:
        key = x_TI.data_ptr(), x_TI.shape
        if key not in cast:
            cast.clear()
            scale_T1 = x_TI.float().abs().amax(1, keepdim=True) / 448
            cast[key] = (x_TI.float() / scale_T1).to(torch.float8_e4m3fn), scale_T1
        codes_TI, scale_T1 = cast[key]
        return torch._scaled_mm(codes_TI, at_OI.T, scale_T1, scale_1O, out_dtype=torch.bfloat16)

    calls = [lambda x, at=weight: call(x, at) for weight in weights]
    return Layer(calls, codes_OI.float() * scale_O1, codes_OI.nbytes, [], tolerance=5e-2)


def sparse_layer(name: str, packed: PackedTensor) -> Layer:
    """A kernel, in as many copies as its tensors need."""
    kernel = choose(LinearSpec(*packed.shape, PATTERN, torch.bfloat16, GPU, packed.kind, packed.group), name)
    prepared = kernel.prepare(packed)
    nbytes = sum(tensor.nbytes for tensor in prepared.values())
    tensors = [{key: tensor.clone() for key, tensor in prepared.items()} for _ in range(copies(nbytes))]
    return Layer([lambda x, at=at: kernel.linear(x, at, None) for at in tensors], packed.unpack(), nbytes, tensors)


def ready(
    layers: dict[str, Layer], count: int, columns: int, failed: dict[str, str], progress: Progress
) -> dict[str, tuple[Run, Run]]:
    """Calls with all copies, by the host and as a graph, by candidate; what raises or is wrong goes to `failed`."""
    x_TI = torch.randn(count, columns, device=GPU).bfloat16()
    runs: dict[str, tuple[Run, Run]] = {}
    for name, layer in layers.items():
        if count > MOST_TOKENS.get(name.split()[0], count):
            continue

        progress.doing(name)

        def everything(calls: list[Call] = layer.calls) -> None:
            for call in calls:
                call(x_TI)

        try:
            expected_TO = x_TI.float() @ layer.exact_OI.float().T
            off = ((layer.calls[-1](x_TI).float() - expected_TO).norm() / expected_TO.norm()).item()
            if not off < layer.tolerance:
                raise ValueError(f"off by {off:.1e}")
            runs[name] = everything, capture(everything)
            torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler, a driver or a library may raise
            failed[f"{name}, {count} tokens"] = str(error)
            torch.cuda.synchronize()  # raises if it broke the context: nothing measured after that would be true
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
    main()
