"""Is a sparse linear layer faster than the dense one, at every number of tokens?

    results = run(KernelsRequest(shapes=((4096, 4096),), tokens=(1, 64)))

For each shape and number of tokens these candidates take turns (`tuning.timing`): torch's dense linear, the dense
linear that vLLM would run, vLLM's dense layers with quantised weights (`plugin.quantised`), and every kernel that
supports the layer, with values in the activations' dtype and in 8 and 4 bits; those that round activations, too.
Weights are random. A speedup below 1 means that dense is faster.

With one token a layer is bound by reading its weight. So a plain read of the compressed bytes is timed too, and each
candidate's time is compared with how long reading its own weight would take at that speed (`of_byte_limit`; 1 is the
best that can be expected).

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

import sparse_serve.kernels as folder
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.registry import names
from maskgen.core.values import FLOAT, INT4, INT8
from sparse_serve.bench import roofline
from sparse_serve.bench.record import run_metadata
from sparse_serve.bench.roofline import Panel, Point, Roof
from sparse_serve.kernels import LinearSpec, choose, cpu
from sparse_serve.plugin import quantised
from sparse_serve.plugin.dense import stock_linear
from sparse_serve.runtime.errors import KernelError
from sparse_serve.runtime.machine import processor
from sparse_serve.runtime.request import Request
from sparse_serve.tuning.measure import torch_dense
from sparse_serve.tuning.timing import Call, Times, interleaved, torch_threads

Positive = Annotated[int, Field(ge=1)]

PATTERN = NMPattern(2, 4)
STORED = ((FLOAT, None), (INT8, None), (INT4, 128))
"""How kept values are stored, and how many share a scale; None: those of a row."""
DENSE = ("dense torch", "dense vllm")
READ = "read of cpu's bytes"
POOL_BYTES = 192 << 20
"""Weights of one candidate, over all copies: several times what a last-level cache holds."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer: a function of x for every copy of its weight, and the bytes of one copy."""

    linears: Sequence[Callable[[Tensor], object]]
    weight_bytes: int


@dataclass(frozen=True)
class Result:
    """One shape and number of tokens, everything by candidate.

    `speedup` is a kernel's over the faster dense layer in the activations' dtype, `speedup_over` the same by dense
    candidate, quantised ones too; `of_byte_limit` is 1 for a layer that takes as long as reading its weight, and is
    there for one token only.
    """

    out_features: int
    in_features: int
    tokens: int
    rounds: int
    weight_bytes: Mapping[str, int]
    median_s: Mapping[str, float]
    speedup: Mapping[str, float]
    speedup_over: Mapping[str, Mapping[str, float]]
    of_byte_limit: Mapping[str, float]

    @property
    def operations(self) -> int:
        """Multiplications and additions of the dense layer."""
        return 2 * self.tokens * self.out_features * self.in_features


class KernelsRequest(Request):
    """What to time. `shapes` are `(out features, in features)`, `seconds` the time for each shape and number of tokens.

    `threads=None` is torch's number of now. Raises `SettingsError` for a value out of range.
    """

    shapes: tuple[tuple[Positive, Positive], ...] = ((14336, 4096), (4096, 4096))
    tokens: tuple[Positive, ...] = (1, 4, 16, 64, 256)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    threads: Positive | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    with_reference: bool = False


def run(
    request: KernelsRequest,
    on_result: Callable[[Result], None] = lambda result: None,
    on_refusal: Callable[[KernelError], None] = lambda error: None,
) -> list[Result]:
    """Time every candidate on every shape and number of tokens.

    `on_result` is called as each result is there, `on_refusal` for a kernel that cannot serve a shape, with its reason.
    """
    dtype, results = getattr(torch, request.dtype), []
    with torch_threads(request.threads):
        for shape in request.shapes:
            candidates = _candidates(shape, dtype, request.with_reference, on_refusal)
            for tokens in request.tokens:
                results.append(_measure(candidates, shape, tokens, dtype, request.seconds))
                on_result(results[-1])
    return results


def record(request: KernelsRequest, results: Sequence[Result]) -> dict[str, Any]:
    """What a result file holds: settings, versions, machine and every figure."""
    settings = {"dtype": request.dtype, "threads": _threads(request), "isa": _isa()}
    return {**run_metadata(), "inputs": {}, **settings, "results": [asdict(result) for result in results]}


def plot(request: KernelsRequest, results: Sequence[Result], file: Path) -> None:
    """Draw a roofline to `file`; its suffix is one of `roofline.FORMATS`."""
    shown = [request.dtype, f"threads: {_threads(request)}", *filter(None, [_isa()])]
    title = f"2:4 against dense linear layers on {processor()} ({', '.join(shown)})"
    roofline.roofline(panels(results), roof(results), title, file)


def _threads(request: KernelsRequest) -> int:
    """How many threads the request is measured with."""
    return request.threads or torch.get_num_threads()


def _isa() -> str | None:
    """The instruction set of the CPU kernel, if it is there."""
    return cpu.isa() if hasattr(torch.ops.sparse_serve_cpu, "isa") else None


def _candidates(
    shape: tuple[int, int], dtype: torch.dtype, with_reference: bool, on_refusal: Callable[[KernelError], None]
) -> dict[str, Candidate]:
    """Everything to compare on one shape `(O, I)`, by name."""
    out_features, in_features = shape
    weight_OI = torch.randn(out_features, in_features).mul_(in_features**-0.5).to(dtype)
    packed = PackedTensor.pack(weight_OI, PATTERN.mask_from_scores(weight_OI.float().abs()), PATTERN)
    candidates = {}
    for name, linear in zip(DENSE, (torch_dense, stock_linear), strict=True):
        copies = range(_copies(weight_OI.nbytes))
        candidates[name] = Candidate([linear(weight_OI.clone()) for _ in copies], weight_OI.nbytes)
    for name, make in quantised.peers().items():
        try:
            layer = make(weight_OI)
        except KernelError as error:
            on_refusal(error)
            continue
        candidates[name] = Candidate([layer.copy() for _ in range(_copies(layer.nbytes))], layer.nbytes)
    for name in names(folder):
        for values, group in STORED:
            spec = LinearSpec(out_features, in_features, PATTERN, dtype, "cpu", values, group, activations=INT8)
            try:
                kernel = choose(spec, name)
            except KernelError as error:
                on_refusal(error)
                continue
            if name == "reference" and not with_reference:
                continue
            stored = packed.quantised(values, group)
            prepared = [kernel.prepare(stored) for _ in range(_copies(stored.nbytes))]
            linears = [lambda x_TI, run=kernel.linear, at=tensors: run(x_TI, at, None) for tensors in prepared]
            weight_bytes = sum(tensor.nbytes for tensor in prepared[0].values())
            candidates[name if values == FLOAT else f"{name} {values}"] = Candidate(linears, weight_bytes)
            if name == "cpu" and values == FLOAT:
                candidates[READ] = _reading([tensors["blocks"] for tensors in prepared])
    return candidates


def _reading(copies: Sequence[Tensor]) -> Candidate:
    half = len(copies) // 2  # not the copy that the kernel has just brought into the cache
    read, in_turn = torch.ops.sparse_serve_cpu.read, (*copies[half:], *copies[:half])
    return Candidate([lambda x_TI, at=tensor: read(at) for tensor in in_turn], copies[0].nbytes)  # type: ignore[misc]


def _measure(
    candidates: Mapping[str, Candidate], shape: tuple[int, int], tokens: int, dtype: torch.dtype, budget_s: float
) -> Result:
    x_TI = torch.randn(tokens, shape[1]).to(dtype)
    calls: dict[str, list[Call]] = {
        name: [lambda run=run: run(x_TI) for run in candidate.linears]  # type: ignore[misc]
        for name, candidate in candidates.items()
        if name != READ or tokens == 1
    }
    times = interleaved(calls, budget_s)
    dense = [name for name in (*DENSE, *quantised.peers()) if name in calls]
    kernels = [name for name in calls if name not in (*dense, READ)]
    weight_bytes = {name: candidates[name].weight_bytes for name in calls}
    return Result(
        *shape,
        tokens,
        rounds=len(times.seconds[DENSE[0]]),
        weight_bytes=weight_bytes,
        median_s={name: times.median_s(name) for name in calls},
        speedup={name: times.speedup(name, DENSE) for name in kernels},
        speedup_over={peer: {name: times.speedup(name, [peer]) for name in kernels} for peer in dense},
        of_byte_limit=of_byte_limit(times, weight_bytes),
    )


def of_byte_limit(times: Times, weight_bytes: Mapping[str, int]) -> dict[str, float]:
    """Time of reading a candidate's weight, at the speed of `READ` in the same round, by its time; empty without."""
    if READ not in weight_bytes:
        return {}
    return {
        name: times.speedup(name, [READ]) * size / weight_bytes[READ]
        for name, size in weight_bytes.items()
        if name != READ
    }


def panels(results: Sequence[Result]) -> list[Panel]:
    """What to draw: every candidate that computes something, by shape."""
    by_shape: dict[str, list[Point]] = {}
    for result in results:
        points = by_shape.setdefault(f"{result.out_features} x {result.in_features}", [])
        for name, median_s in result.median_s.items():
            if name != READ:
                per_byte, per_s = result.operations / result.weight_bytes[name], result.operations / median_s
                points.append(Point(name, result.tokens, per_byte, per_s))
    return [Panel(title, points) for title, points in by_shape.items()]


def roof(results: Sequence[Result]) -> Roof:
    """The fastest plain read and the fastest dense layer of all results."""
    reads = [result.weight_bytes[READ] / result.median_s[READ] for result in results if READ in result.median_s]
    dense = [result.operations / result.median_s[name] for result in results for name in DENSE]
    return Roof(max(reads, default=None), max(dense))


def _copies(nbytes: int) -> int:
    return max(2, -(-POOL_BYTES // nbytes))
