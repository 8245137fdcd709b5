"""Every file of `kernels/` that serves a GPU, on one: right numbers at every end, graphs, torch.compile, repeats.

A kernel that refuses is skipped with its reason. Every new combination of dtype, values, bias, tokens and split makes
`skinny` compile for about a second, so codes are not tried with all that floats are tried with.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import sparse_serve.kernels as folder
from maskgen.core.int4 import unpack_nibbles
from maskgen.core.packed import PackedTensor
from maskgen.core.registry import names
from maskgen.core.values import CODE_DTYPES, FLOAT, FP8, INT4, INT8
from sparse_serve.kernels import Kernel, LinearSpec, choose, skinny
from sparse_serve.runtime.errors import KernelError
from tests.gpu import oracle
from tests.gpu.oracle import PATTERN, STORED, TOLERANCE

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

TOKENS = (0, 1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 257)
SHAPES = [(16, 16), (16, 4096), (40, 264), (48, 1296), (1000, 520), (4112, 1024), (1024, 14336)]
GPU = torch.device("cuda")


packed_weight = partial(oracle.packed_weight, device="cuda")


def kernel_or_skip(name: str, packed: PackedTensor, dtype: torch.dtype) -> Kernel:
    try:
        return choose(LinearSpec(*packed.shape, PATTERN, dtype, "cuda", packed.kind, packed.group), name)
    except KernelError as error:
        pytest.skip(str(error))


def assert_is_product(y_TO: Tensor, x_TI: Tensor, packed: PackedTensor, bias_O: Tensor | None = None) -> None:
    """Twice the tolerance for sums that a library makes of rounded ones, and twice that where it rounds the weight."""
    oracle.assert_is_product(y_TO, x_TI, packed, bias_O, slack=2 if packed.kind == FLOAT else 4)


def poison(y_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave NaN in the memory the next output will get, so that an element nobody writes shows."""
    torch.full(y_shape, torch.nan, dtype=dtype, device=GPU)


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("values", "group"), STORED)
def test_equals_dense_in_float64(
    name: str, dtype: torch.dtype, shape: tuple[int, int], values: str, group: int | None
) -> None:
    torch.manual_seed(0)
    packed = packed_weight(*shape, dtype, values, group)
    kernel = kernel_or_skip(name, packed, dtype)
    tensors = kernel.prepare(packed)
    for tokens in TOKENS:
        some_bias_O = torch.randn(shape[0], device=GPU).to(dtype)
        for bias_O in (None, some_bias_O) if values == FLOAT else (some_bias_O,):
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
        assert_is_product(kernel.linear(x_TI, tensors, None), x_TI, packed)
    assert kernel.linear(torch.randn(128, device=GPU).bfloat16(), tensors, None).shape == (64,)


@pytest.mark.parametrize("wide", [1, 2, 4])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("tokens", "values", "group"),
    [*((tokens, FLOAT, None) for tokens in (3, 12, 32, 70)), (70, INT8, None), (70, INT4, 64)],
)
def test_every_split_of_skinny_is_right(wide: int, warps: int, tokens: int, values: str, group: int | None) -> None:
    torch.manual_seed(2)
    packed = packed_weight(1000, 4104, torch.bfloat16, values, group)
    kernel_or_skip("skinny", packed, torch.bfloat16)
    tensors, x_TI = skinny.prepare(packed), torch.randn(tokens, 4104, device=GPU).bfloat16()
    poison((tokens, 1000), torch.bfloat16)
    y_TO = skinny.skinny_linear(x_TI, tensors["blocks"], tensors["form"], tensors.get("scale"), None, wide, warps)
    assert_is_product(y_TO, x_TI, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("values", "group"), [stored for stored in STORED if stored[0] != FLOAT])
def test_skinny_expands_every_code_exactly(dtype: torch.dtype, values: str, group: int | None) -> None:
    """One byte a row, at its place in the group and tile that column 8 * row falls in: its code has to come back, times
    1, or its two of int4, times 1 and 16."""
    octets = torch.arange(256, device=GPU, dtype=torch.int32).to(torch.uint8)
    mask_OI = torch.tensor([True, True, False, False], device=GPU).repeat(256, 512)
    packed = PackedTensor.pack(torch.ones(256, 2048, device=GPU, dtype=dtype), mask_OI, PATTERN)
    packed = packed.quantised(values, group)
    kernel_or_skip("skinny", packed, dtype)
    packed.values.view(torch.uint8).zero_()
    rows = torch.arange(256, device=GPU)
    packed.values.view(torch.uint8)[rows, (2 if values == INT4 else 4) * rows] = octets
    assert packed.scale is not None
    packed.scale.fill_(1)
    x_TI = torch.tensor([[1, 16]], device=GPU, dtype=dtype).repeat(1, 1024)
    if values == INT4:
        expected_O = unpack_nibbles(octets[:, None]).to(dtype) @ x_TI[0, :2]
    else:
        expected_O = octets.view(CODE_DTYPES[values]).to(dtype)
    y_TO = skinny.linear(x_TI, skinny.prepare(packed), None)
    ok = ~expected_O.isnan()
    assert torch.equal(y_TO[0][ok], expected_O[ok])


@pytest.mark.parametrize("name", sorted(set(names(folder)) - {"cusparselt"}))  # whose split-k may add in any order
@pytest.mark.parametrize(
    ("tokens", "values", "group"),
    [*((tokens, FLOAT, None) for tokens in (1, 9, 32, 100)), (32, FP8, None), (32, INT4, 128)],
)
def test_repeats_are_bit_identical(name: str, tokens: int, values: str, group: int | None) -> None:
    packed = packed_weight(4096, 4096, torch.bfloat16, values, group)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors, x_TI = kernel.prepare(packed), torch.randn(tokens, 4096, device=GPU).bfloat16()
    first_TO = kernel.linear(x_TI, tensors, None)
    assert all(torch.equal(first_TO, kernel.linear(x_TI, tensors, None)) for _ in range(20))


@pytest.mark.parametrize("name", sorted(set(names(folder)) - {"reference"}))  # whose unpacking stops the host
@pytest.mark.parametrize(
    ("tokens", "values", "group"),
    [*((tokens, FLOAT, None) for tokens in (1, 9, 32, 100)), (100, INT8, None), (100, INT4, 64)],
)
def test_a_captured_graph_replays_the_same_numbers(name: str, tokens: int, values: str, group: int | None) -> None:
    packed = packed_weight(1024, 2048, torch.bfloat16, values, group)
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
@pytest.mark.parametrize(("values", "group"), STORED)
def test_torch_compile_gives_the_same_numbers(name: str, values: str, group: int | None) -> None:
    torch._dynamo.reset()  # every case compiles the same code object, and dynamo allows eight variants of one
    packed = packed_weight(128, 256, torch.bfloat16, values, group)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors, x_TI = kernel.prepare(packed), torch.randn(5, 256, device=GPU).bfloat16()

    def run(x_TI: Tensor) -> Tensor:
        return kernel.linear(x_TI, tensors, None)

    assert torch.equal(torch.compile(run, fullgraph=True)(x_TI), run(x_TI))


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize(("values", "group"), STORED)
def test_the_weight_stays_compressed(name: str, values: str, group: int | None) -> None:
    packed = packed_weight(4096, 4096, torch.bfloat16, values, group)
    kernel = kernel_or_skip(name, packed, torch.bfloat16)
    tensors = kernel.prepare(packed)
    part = {FLOAT: 0.57, INT4: 0.21}.get(values, 0.32)
    if name == "cusparselt":  # which makes codes bfloat16
        part = 0.57
    assert sum(tensor.nbytes for tensor in tensors.values()) <= part * packed.dense_nbytes(torch.bfloat16)
