"""A race: the willing kernels and torch's dense linear on one shape, at several numbers of tokens.

Weights are random and every contender has several copies of them, more together than a last-level cache holds. A
contender that needs several times as long as the fastest is out after a few calls: it has lost, and how clearly nobody
asks. On a GPU the calls of all copies are captured in one CUDA graph, as vLLM runs them: launching costs nothing.

What counts is the best time of several rounds: other work on the machine can only add to it, and a choice that is kept
must not depend on the moment it was made in.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.values import FLOAT
from sparse_serve.kernels import Kernel, LinearSpec
from sparse_serve.timing import Call, interleaved

DENSE = "dense"
POOL_BYTES = 128 << 20
HOPELESS = 4.0
BUDGET_S = 0.5

_TILE_ROWS = 64
_MOST_COPIES = 16
_CHANCES = 2

Linear = Any
"""x `[T, I]` -> y `[T, O]`, with one copy of the weights."""


def race(spec: LinearSpec, kernels: Mapping[str, Kernel], tokens: Iterable[int]) -> dict[int, dict[str, float]]:
    """Seconds of one call, by number of tokens and contender: `kernels` and `dense`."""
    with torch.inference_mode():
        contenders = _contenders(spec, kernels)
        return {count: _heat(spec, contenders, count) for count in tokens}


def _heat(spec: LinearSpec, contenders: Mapping[str, list[Linear]], tokens: int) -> dict[str, float]:
    x_TI = _random(spec, tokens, spec.in_features).to(spec.dtype)
    calls: dict[str, list[Call]] = {
        name: [lambda run=run: run(x_TI) for run in copies]  # type: ignore[misc]
        for name, copies in contenders.items()
    }
    first = {name: _best_s(spec, copies) for name, copies in calls.items()}
    for name in calls:
        for _ in range(_CHANCES):
            if first[name] > HOPELESS * min(first.values()):
                first[name] = min(first[name], _best_s(spec, calls[name]))
    racing = [name for name in calls if first[name] <= HOPELESS * min(first.values())]
    if spec.device_type != "cuda":
        times = interleaved({name: calls[name] for name in racing}, BUDGET_S, least=3, most=60)
        return first | {name: min(times.seconds[name]) for name in racing}
    times = interleaved({name: [_graph(calls[name])] for name in racing}, BUDGET_S, least=9, most=60)
    return first | {name: min(times.seconds[name]) / len(calls[name]) for name in racing}


def _contenders(spec: LinearSpec, kernels: Mapping[str, Kernel]) -> dict[str, list[Linear]]:
    packed = random_weight(spec)
    dense_OI = packed.unpack().to(spec.dtype)
    count = min(_MOST_COPIES, max(2, -(-POOL_BYTES // packed.nbytes)))
    contenders: dict[str, list[Linear]] = {
        DENSE: [partial(torch.nn.functional.linear, weight=dense_OI.clone()) for _ in range(count)]
    }
    for name, kernel in kernels.items():
        prepared = [kernel.prepare(packed) for _ in range(count)]
        contenders[name] = [lambda x_TI, run=kernel.linear, at=tensors: run(x_TI, at, None) for tensors in prepared]
    return contenders


def _best_s(spec: LinearSpec, copies: list[Call]) -> float:
    """Of two calls: the first of all may compile."""
    best_s = math.inf
    for call in (copies[0], copies[-1]):
        begun_s = time.perf_counter()
        call()
        if spec.device_type == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - begun_s)
    return best_s


def _graph(copies: list[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in copies:
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def device_name(device_type: str) -> str:
    """What a figure measured here is true for."""
    return torch.cuda.get_device_name() if device_type == "cuda" else processor()


def processor() -> str:
    """The processor's name as the operating system has it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def random_weight(spec: LinearSpec) -> PackedTensor:
    """A sparse weight of `spec`'s shape. A few random rows again and again: no kernel's time depends on values."""
    rows = min(spec.out_features, _TILE_ROWS)
    weight = _random(spec, rows, spec.in_features).mul_(spec.in_features**-0.5)
    kept = spec.pattern.mask_from_scores(_random(spec, rows, spec.in_features))
    dtype = spec.dtype if spec.values == FLOAT else torch.float32
    tile = PackedTensor.pack(weight.to(dtype), kept, spec.pattern).quantised(spec.values)
    times = -(-spec.out_features // rows)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(times, *(1 for _ in tensor.shape[1:]))[: spec.out_features]

    scale = None if tile.scale is None else repeated(tile.scale)
    return PackedTensor(repeated(tile.values), repeated(tile.bitmask), spec.pattern, scale)


def _random(spec: LinearSpec, *shape: int) -> Tensor:
    """From a generator of its own: measuring must not move the seed of what is served."""
    generator = torch.Generator(spec.device_type).manual_seed(0)
    return torch.randn(shape, generator=generator, device=spec.device_type, dtype=torch.float32)
