"""What sparsity alone brings with one token: `python -m tests.bench.own_dense`.

Part of the 2:4 kernel's lead over torch and vLLM is better code: a layout made for reading, 2 MiB pages. Here it meets
a dense bfloat16 kernel that has both (`own_dense.cpp`, built with g++ on the spot), torch's dense layer, the one that
stock vLLM runs, in bfloat16 and in float32, and a plain read of the compressed bytes; all take turns (`timing`).

It needs a processor with AVX-512 and its bfloat16 instructions.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import LinearSpec, choose, cpu
from sparse_serve.plugin.dense import stock_linear
from sparse_serve.runtime.machine import processor
from sparse_serve.tuning.samples import random_weight
from sparse_serve.tuning.timing import Call, interleaved
from tests.bench.record import save

SHAPES = ((14336, 4096), (4096, 4096))
POOL_BYTES = 192 << 20
Made = TypeVar("Made")
OwnDense = Callable[[Tensor, Tensor], Tensor]
"""`(strips of W, x [1, I]) -> y [O]`."""

OURS, READ = "2:4", "read of the 2:4 bytes"


def main() -> int:
    """Measure, print a line per peer, save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="per shape")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        own_dense = _build(Path(folder))
        results = [_measure(shape, args.seconds, own_dense) for shape in SHAPES]
    Console().print(
        save("own-dense", "cpu", {"processor": processor(), "threads": args.threads, "results": results}).name
    )
    return 0


def _measure(shape: tuple[int, int], seconds: float, own_dense: OwnDense) -> dict[str, object]:
    """Median time of the 2:4 kernel's peers over its own, by peer, and its own in ms."""
    spec = LinearSpec(*shape, NMPattern(2, 4), torch.bfloat16, "cpu")
    packed = random_weight(spec)
    dense_OI, x_1I = packed.unpack(), torch.randn(1, shape[1])
    x_1I, x32_1I = x_1I.bfloat16(), x_1I
    calls = {
        OURS: _sparse(spec, packed, x_1I),
        "own dense": [partial(own_dense, w, x_1I) for w in _copies(dense_OI, lambda w: huge(strips(w)))],
        "torch dense": [partial(torch.nn.functional.linear, x_1I, w) for w in _copies(dense_OI, Tensor.clone)],
        "vllm dense": [partial(run, x_1I) for run in _copies(dense_OI, lambda w: stock_linear(w.clone()))],
        "vllm dense float32": [partial(run, x32_1I) for run in _copies(dense_OI, lambda w: stock_linear(w.float()))],
        READ: _reads(spec, packed),
    }
    expected, found = x_1I.float() @ dense_OI.float().T, calls["own dense"][0]()
    torch.testing.assert_close(found, expected[0].bfloat16(), rtol=0.02, atol=0.02)
    times = interleaved(calls, seconds, most=2000)
    ratios = {name: times.speedup(OURS, [name]) for name in calls if name != OURS}
    say = Console().print
    say(f"{shape[0]} x {shape[1]}, {OURS} takes {times.median_s(OURS) * 1e3:.3f} ms; time of the others by it:")
    for name, ratio in ratios.items():
        say(f"  {name:22} {ratio:.2f}")
    return {"shape": shape, "rounds": len(times.seconds[OURS]), "ours_s": times.median_s(OURS), "time_by_ours": ratios}


def _copies(dense_OI: Tensor, make: Callable[[Tensor], Made]) -> list[Made]:
    return [make(dense_OI) for _ in range(max(2, -(-POOL_BYTES // dense_OI.nbytes)))]


def _sparse(spec: LinearSpec, packed: PackedTensor, x_1I: Tensor) -> list[Call]:
    kernel = choose(spec, "cpu")
    copies = [kernel.prepare(packed) for _ in range(-(-POOL_BYTES // packed.nbytes))]
    return [partial(kernel.linear, x_1I, tensors, None) for tensors in copies]


def _reads(spec: LinearSpec, packed: PackedTensor) -> list[Call]:
    kernel = choose(spec, "cpu")
    copies = [kernel.prepare(packed)["blocks"] for _ in range(-(-POOL_BYTES // packed.nbytes))]
    return [partial(torch.ops.sparse_serve_cpu.read, blocks) for blocks in copies]


def strips(weight_OI: Tensor) -> Tensor:
    """`[O / 16, I / 2, 16, 2]`: what `own_dense.cpp` reads."""
    rows, columns = weight_OI.shape
    return weight_OI.view(rows // 16, 16, columns // 2, 2).transpose(1, 2)


def huge(tensor: Tensor) -> Tensor:
    """A contiguous copy in 2 MiB pages, which the 2:4 kernel's weights have."""
    memory = mmap.mmap(-1, tensor.nbytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _build(folder: Path) -> OwnDense:
    """Compile the kernel."""
    choose(LinearSpec(16, 16, NMPattern(2, 4), torch.bfloat16, "cpu"), "cpu")  # loads the library that knows
    if cpu.isa() not in ("avx512", "amx"):
        raise SystemExit(f"this processor's instructions are {cpu.isa()}; expected avx512 or amx")
    library, source = folder / "own_dense.so", Path(__file__).with_suffix(".cpp")
    subprocess.run(["g++", "-O3", "-fopenmp", "-shared", "-fPIC", "-o", library, source], check=True)
    run = ctypes.CDLL(str(library)).own_dense
    run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]

    def own_dense(weight: Tensor, x_1I: Tensor) -> Tensor:
        y_O = torch.empty(weight.shape[0] * 16, dtype=torch.bfloat16)
        run(weight.data_ptr(), x_1I.data_ptr(), y_O.data_ptr(), len(y_O), x_1I.shape[1], torch.get_num_threads())
        return y_O

    return own_dense


if __name__ == "__main__":
    raise SystemExit(main())
