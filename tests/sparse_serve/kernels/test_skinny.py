"""The GPU decode kernel without a GPU: its layout against the PTX ISA, its compiled code in an emulator, its loads.

Legend: T = tokens, O = out features, I = in features, S = strips, C = chunks, W = words.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import LinearSpec, skinny
from tests.gpu.emulator import LANES, G, Program, T, multiply_sparse

PATTERN = NMPattern(2, 4)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
SPEC = LinearSpec(64, 64, PATTERN, torch.bfloat16, "cuda")
TRITON = find_spec("triton")
define_kernel = skinny._kernel.__wrapped__
BIN = Path(TRITON.origin or "").parent / "backends/nvidia/bin" if TRITON else Path()

compiles = pytest.mark.skipif(not (BIN / "ptxas").exists(), reason="no Triton with its NVIDIA backend here")
quiet = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def packed_weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> PackedTensor:
    mask_OI = PATTERN.mask_from_scores(torch.rand(rows, columns))
    return PackedTensor.pack(torch.randn(rows, columns, dtype=dtype), mask_OI, PATTERN)


def assert_is_product(y_TO: Tensor, x_TI: Tensor, packed: PackedTensor, bias_O: Tensor | None = None) -> None:
    weight_OI = packed.unpack().double()
    bias = torch.zeros(len(weight_OI)).double() if bias_O is None else bias_O.double()
    expected_TO = x_TI.double() @ weight_OI.T + bias
    size_TO = x_TI.double().abs() @ weight_OI.abs().T + bias.abs() + 1e-3
    assert y_TO.shape == expected_TO.shape
    assert ((y_TO.double() - expected_TO).abs() <= TOLERANCE[packed.values.dtype] * size_TO).all()


def product_by_fragments(x_TI: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Up to 8 tokens, as the kernel's lanes and the tensor core see them."""
    blocks_SCW = tensors["blocks"].numpy().view(np.uint32)
    strips, chunks, _ = blocks_SCW.shape
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[x_TI.dtype]
    words_TI = np.zeros((8, chunks * 128), np.uint32)
    words_TI[: len(x_TI), : x_TI.shape[1] // 2] = x_TI.contiguous().view(torch.int32).numpy().view(np.uint32)
    sums = np.zeros((strips, 32, 4), np.float32)
    for chunk in range(chunks):
        codes, values = blocks_SCW[:, chunk, :128].reshape(strips, 32, 4), blocks_SCW[:, chunk, 128:]
        for tile in range(8):
            a = values[:, 128 * tile : 128 * (tile + 1)].reshape(strips, 32, 4)
            mine = words_TI[G[:, None], chunk * 128 + tile * 16 + T[:, None] * 4 + np.arange(4)]
            even, odd = mine[LANES & ~1], mine[LANES | 1]  # of each pair of lanes
            halves = [
                np.stack([even[:, part], even[:, part + 2], odd[:, part], odd[:, part + 2]], -1) for part in (0, 1)
            ]
            b = np.where(LANES[:, None] % 2 == 0, halves[0], halves[1])
            b = np.broadcast_to(b, a.shape)
            sums = multiply_sparse(a, b, codes[:, :, tile // 2], sums, tile % 2, kind)
    y_OT = np.zeros((strips, 16, 8), np.float32)
    for register in range(4):
        y_OT[:, G + 8 * (register // 2), 2 * T + register % 2] = sums[:, :, register]
    return torch.from_numpy(y_OT.reshape(-1, 8)[: len(tensors["form"]), : len(x_TI)].T.copy())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 100).map(lambda groups: 8 * groups),
    tokens=st.integers(1, 8),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
def test_the_layout_is_what_the_tensor_core_reads(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    packed, x_TI = packed_weight(rows, columns, dtype), torch.randn(tokens, columns, dtype=dtype)
    y_TO = product_by_fragments(x_TI, skinny.prepare(packed))
    expected_TO = x_TI.double() @ packed.unpack().double().T
    torch.testing.assert_close(y_TO.double(), expected_TO, rtol=1e-5, atol=1e-4)


def test_a_whole_layout_costs_0_5625_of_the_dense_bytes() -> None:
    packed = packed_weight(64, 512)
    tensors = skinny.prepare(packed)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 0.5625 * packed.dense_nbytes(torch.bfloat16)
    assert tensors["blocks"].is_contiguous() and tensors["form"].nbytes == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device_type": "cpu"}, "device cpu is not an NVIDIA GPU"),
        ({"pattern": NMPattern(4, 8)}, "pattern 4:8 is not 2:4"),
        ({"dtype": torch.float32}, "dtype torch.float32 is not one of"),
        ({"values": "int8"}, "values int8 are not float"),
    ],
)
def test_it_says_why_it_refuses(changed: dict[str, Any], reason: str) -> None:
    assert reason in (skinny.refuse(LinearSpec(**{**SPEC.__dict__, **changed})) or "")


@compiles
def test_it_refuses_a_gpu_without_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "(7, 5) is below (8, 0)" in (skinny.refuse(SPEC) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert skinny.refuse(SPEC) is None


def test_importing_it_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; from sparse_serve.kernels import skinny; "
        "problem = skinny._problem(); assert problem and 'Gluon' in problem, problem"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Driver:
    """As much of a GPU driver as Triton needs to compile."""

    capability = 90

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    from triton.runtime import driver as triton_driver

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(triton_driver, "_active", Driver(), raising=False)
        yield Driver()


class Emulated:
    """Stands in for the Gluon kernel: compiles what it is called with, and runs the PTX in the emulator."""

    def __init__(self) -> None:
        self.kernel = define_kernel()

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            flat = [a if isinstance(a, int) else a.view(torch.int16).numpy() for a in arguments]
            Program(compiled.asm["ptx"]).run(grid, flat)

        return launch


@pytest.fixture
def emulated(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "_kernel", cache(Emulated))


@compiles
@quiet
@few
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 160).map(lambda groups: 8 * groups),
    tokens=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 32, 33, 41]),
    dtype=st.sampled_from(list(TOLERANCE)),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_compiled_kernel_is_right_at_every_end(
    emulated: None, rows: int, columns: int, tokens: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    """The whole of `linear`, on the code Triton makes for Hopper: no access leaves its buffer either."""
    torch.manual_seed(seed)
    packed, x_TI = packed_weight(rows, columns, dtype), torch.randn(tokens, columns, dtype=dtype)
    bias_O = torch.randn(rows, dtype=dtype) if with_bias else None
    assert_is_product(skinny.linear(x_TI, skinny.prepare(packed), bias_O), x_TI, packed, bias_O)


@compiles
@quiet
@pytest.mark.parametrize(("wide", "warps", "tokens"), [(1, 4, 12), (1, 8, 41), (1, 16, 3), (2, 8, 41)])
def test_every_split_and_several_passes_are_right(emulated: None, wide: int, warps: int, tokens: int) -> None:
    torch.manual_seed(0)
    packed, x_TI = packed_weight(40, 1288), torch.randn(tokens, 1288).bfloat16()
    tensors = skinny.prepare(packed)
    assert_is_product(skinny.skinny_linear(x_TI, tensors["blocks"], tensors["form"], None, wide, warps), x_TI, packed)


@compiles
@quiet
def test_any_shape_of_input_is_taken(emulated: None) -> None:
    torch.manual_seed(1)
    packed = packed_weight(24, 64)
    tensors = skinny.prepare(packed)
    assert skinny.linear(torch.randn(0, 64).bfloat16(), tensors, None).shape == (0, 24)
    assert skinny.linear(torch.randn(64).bfloat16(), tensors, None).shape == (24,)
    inputs = [
        torch.randn(2, 3, 64).bfloat16(),
        torch.randn(64, 5).bfloat16().T,
        torch.randn(321).bfloat16()[1:].view(5, 64),  # starts inside a 16-byte word
    ]
    for x_TI in inputs:
        assert_is_product(skinny.linear(x_TI, tensors, None), x_TI, packed)


@compiles
@quiet
def test_torch_accepts_the_operator(emulated: None) -> None:
    tensors = skinny.prepare(packed_weight(24, 64))
    arguments = (torch.randn(3, 64).bfloat16(), tensors["blocks"], tensors["form"], torch.randn(24).bfloat16())
    torch.library.opcheck(skinny.skinny_linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_together_is_an_error() -> None:
    tensors = skinny.prepare(packed_weight(24, 64))
    for wrong in (torch.randn(3, 56).bfloat16(), torch.randn(3, 64).half()):
        with pytest.raises(ValueError, match=r"x is .*, expected torch.bfloat16 \[..., 64\]"):
            skinny.linear(wrong, tensors, None)
    for bias_O in (torch.randn(23).bfloat16(), torch.randn(24)):
        with pytest.raises(ValueError, match=r"bias is .*, expected contiguous torch.bfloat16 \[24\]"):
            skinny.linear(torch.randn(3, 64).bfloat16(), tensors, bias_O)


@compiles
@quiet
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_all_loads_of_a_chunk_are_16_bytes_wide_and_come_before_its_products(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, tokens: int
) -> None:
    monkeypatch.setattr(Driver, "capability", capability)
    wide, warps = skinny.split(tokens, 256, 16)
    y_TO, kernel = torch.empty(1, 16).bfloat16(), define_kernel()
    constants = {"MULTIPLY": skinny._multiplies(torch.bfloat16), "WIDE": wide, "EIGHTS": -(-tokens // 8)}
    words = torch.empty(1152, dtype=torch.int32)
    compiled = kernel.warmup(
        words, words, y_TO, y_TO, tokens, 16, 32, 1, 1, **constants, WARPS=warps, BIAS=True, num_warps=warps, grid=(1,)
    )
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    run = [str(BIN / "cuobjdump"), "-sass", "-res-usage", str(binary)]
    report = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", report) == ["0"], "registers spill"
    assert int(re.findall(r"REG:(\d+)", report)[0]) <= (64 if tokens == 1 else 65536 // (32 * warps))
    loads_and_products = re.findall(r"LDG\.E\.EF\.128|LDG\.E\.128|HMMA\.SP|LDG\.E ", report)
    kinds = [kind for kind in loads_and_products if kind != "LDG.E.128"]
    assert kinds[: 9 * wide] == ["LDG.E.EF.128"] * 9 * wide
    assert set(kinds[9 * wide :]) == {"HMMA.SP"} and len(kinds) == 9 * wide + 8 * wide * -(-tokens // 8)
    assert loads_and_products.count("LDG.E.128") == 8 * -(-tokens // 8), "an activation load fell apart"
