"""Every file of `kernels/` that serves a GPU, on one: right numbers at every end, graphs, torch.compile, repeats.

The oracle is a dense product in float64 on fresh random numbers. A kernel that refuses is skipped with its reason.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_serve.kernels as folder
from maskgen.core.folder import names
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import FLOAT, KINDS
from sparse_serve.errors import KernelError
from sparse_serve.kernels import Kernel, LinearSpec, choose, skinny

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

PATTERN = NMPattern(2, 4)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TOKENS = (0, 1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 257)
SHAPES = [(16, 16), (16, 4096), (40, 264), (48, 1296), (1000, 520), (4112, 1024), (1024, 14336)]
GPU = torch.device("cuda")


def packed_weight(rows: int, columns: int, dtype: torch.dtype, values: str = FLOAT) -> PackedTensor:
    weight_OI = torch.randn(rows, columns, device=GPU).mul_(columns**-0.5).to(dtype)
    mask_OI = PATTERN.mask_from_scores(torch.rand(rows, columns, device=GPU))
    return PackedTensor.pack(weight_OI, mask_OI, PATTERN).quantised(values)


def kernel_or_skip(name: str, packed: PackedTensor, dtype: torch.dtype) -> Kernel:
    try:
        return choose(LinearSpec(*packed.shape, PATTERN, dtype, "cuda", packed.kind), name)
    except KernelError as error:
        pytest.skip(str(error))


def assert_is_product(y_TO: Tensor, x_TI: Tensor, packed: PackedTensor, bias_O: Tensor | None) -> None:
    weight_OI = packed.unpack().double()
    bias = torch.zeros(len(weight_OI), device=GPU).double() if bias_O is None else bias_O.double()
    expected_TO = x_TI.double() @ weight_OI.T + bias
    size_TO = x_TI.double().abs() @ weight_OI.abs().T + bias.abs() + 1e-3
    assert y_TO.dtype == x_TI.dtype and y_TO.shape == expected_TO.shape
    error_TO = (y_TO.double() - expected_TO).abs()
    # A quantised weight is rounded to the activations' dtype first, hence twice the tolerance there.
    allowed = TOLERANCE[x_TI.dtype] * (1 if packed.kind == FLOAT else 2)
    assert (error_TO <= allowed * size_TO).all(), f"off by {(error_TO / size_TO).max().item():.2e} of the terms"


def poison(y_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave NaN in the memory the next output will get, so that an element nobody writes shows."""
    torch.full(y_shape, torch.nan, dtype=dtype, device=GPU)


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", KINDS)
def test_equals_dense_in_float64(name: str, dtype: torch.dtype, shape: tuple[int, int], values: str) -> None:
    torch.manual_seed(0)
    packed = packed_weight(*shape, dtype, values)
    kernel = kernel_or_skip(name, packed, dtype)
    tensors = kernel.prepare(packed)
    for tokens in TOKENS:
        for bias_O in (None, torch.randn(shape[0], device=GPU).to(dtype)):
            x_TI = torch.randn(tokens, shape[1], device=GPU).to(dtype)
            poison((tokens, shape[0]), dtype)
            assert_is_product(kernel.linear(x_TI, tensors, bias_O), x_TI, packed, bias_O)


@pytest.mark.parametrize("name", names(folder))
def test_any_layout_of_the_input_is_taken(name: str) -> None:
    torch.manual_seed(1)
    packed = packed_weight(64, 128, torch.bfloat16)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors = kernel.prepare(packed)
    inputs = [
        torch.randn(2, 3, 128, device=GPU),
        torch.randn(128, 5, device=GPU).T,
        torch.randn(6, 256, device=GPU)[:, ::2],
        torch.randn(6, 256, device=GPU)[:, 128:],
    ]
    slices = torch.randn(1281, device=GPU).bfloat16()[1:].view(10, 128)  # starts inside a 16-byte word
    for x_TI in (*(x.bfloat16() for x in inputs), slices):
        assert_is_product(kernel.linear(x_TI, tensors, None), x_TI, packed, None)
    assert kernel.linear(torch.randn(128, device=GPU).bfloat16(), tensors, None).shape == (64,)


@pytest.mark.parametrize("wide", [1, 2])
@pytest.mark.parametrize("warps", [4, 8, 16])
@pytest.mark.parametrize("tokens", [3, 12, 32, 70])
def test_every_split_of_skinny_is_right(wide: int, warps: int, tokens: int) -> None:
    torch.manual_seed(2)
    packed = packed_weight(1000, 4104, torch.bfloat16)
    kernel_or_skip("skinny", packed, torch.bfloat16)
    tensors, x_TI = skinny.prepare(packed), torch.randn(tokens, 4104, device=GPU).bfloat16()
    poison((tokens, 1000), torch.bfloat16)
    y_TO = skinny.skinny_linear(x_TI, tensors["blocks"], tensors["form"], None, wide, warps)
    assert_is_product(y_TO, x_TI, packed, None)


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize("tokens", [1, 9, 32, 100])
def test_repeats_are_bit_identical(name: str, tokens: int) -> None:
    packed = packed_weight(4096, 4096, torch.bfloat16)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors, x_TI = kernel.prepare(packed), torch.randn(tokens, 4096, device=GPU).bfloat16()
    first_TO = kernel.linear(x_TI, tensors, None)
    assert all(torch.equal(first_TO, kernel.linear(x_TI, tensors, None)) for _ in range(20))


@pytest.mark.parametrize("name", sorted(set(names(folder)) - {"reference"}))  # whose unpacking stops the host
@pytest.mark.parametrize("tokens", [1, 9, 32, 100])
def test_a_captured_graph_replays_the_same_numbers(name: str, tokens: int) -> None:
    packed = packed_weight(1024, 2048, torch.bfloat16)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors, bias_O = kernel.prepare(packed), torch.randn(1024, device=GPU).bfloat16()
    x_TI = torch.randn(tokens, 2048, device=GPU).bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernel.linear(x_TI, tensors, bias_O)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TO = kernel.linear(x_TI, tensors, bias_O)
    for _ in range(3):
        x_TI.copy_(torch.randn(tokens, 2048, device=GPU))
        y_TO.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y_TO, kernel.linear(x_TI, tensors, bias_O))


@pytest.mark.parametrize("name", names(folder))
def test_torch_compile_gives_the_same_numbers(name: str) -> None:
    packed = packed_weight(128, 256, torch.bfloat16)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors, x_TI = kernel.prepare(packed), torch.randn(5, 256, device=GPU).bfloat16()

    def run(x_TI: Tensor) -> Tensor:
        return kernel.linear(x_TI, tensors, None)

    assert torch.equal(torch.compile(run, fullgraph=True)(x_TI), run(x_TI))


@pytest.mark.parametrize("name", names(folder))
def test_the_weight_stays_compressed(name: str) -> None:
    packed = packed_weight(4096, 4096, torch.bfloat16)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors = kernel.prepare(packed)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 0.57 * packed.dense_nbytes(torch.bfloat16)
