"""The GPU decode kernel as Triton compiles it, without a GPU: run in an emulator, and its machine code looked at.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskgen.core.values import CODE_DTYPES, FLOAT, FP8, INT4, INT8
from sparse_serve.kernels import LinearSpec, skinny
from tests.gpu.emulator import Program
from tests.gpu.oracle import PATTERN, STORED, assert_is_product, packed_weight

DTYPES = (torch.bfloat16, torch.float16)
TRITON = find_spec("triton")
define_kernel = skinny._kernel.__wrapped__
BIN = Path(TRITON.origin or "").parent / "backends/nvidia/bin" if TRITON else Path()

pytestmark = [
    pytest.mark.skipif(not (BIN / "ptxas").exists(), reason="no Triton with its NVIDIA backend here"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]
few = settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@few
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 160).map(lambda groups: 8 * groups),
    tokens=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 32, 33, 41]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(STORED),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_compiled_kernel_is_right_at_every_end(
    emulated: None,
    rows: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype,
    stored: tuple[str, int | None],
    with_bias: bool,
    seed: int,
) -> None:
    """The whole of `linear`, on the code Triton makes for Hopper: no access leaves its buffer either."""
    torch.manual_seed(seed)
    packed, x_TI = packed_weight(rows, columns, dtype, *stored), torch.randn(tokens, columns, dtype=dtype)
    bias_O = torch.randn(rows, dtype=dtype) if with_bias else None
    assert_is_product(skinny.linear(x_TI, skinny.prepare(packed), bias_O), x_TI, packed, bias_O)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("values", "group"), [stored for stored in STORED if stored[0] != FLOAT])
def test_a_layer_of_every_code_is_right(emulated: None, dtype: torch.dtype, values: str, group: int | None) -> None:
    """Codes of all sizes in every row, under scales that differ by powers of ten, and then a bias."""
    torch.manual_seed(3)
    packed, bias_O = packed_weight(40, 1288, dtype, values, group), torch.randn(40, dtype=dtype)
    octets = torch.arange(packed.values.numel(), dtype=torch.int32).remainder_(256).to(torch.uint8)
    if values == FP8:
        octets[(octets & 0x7F) == 0x7F] = 0  # NaN
    packed.values.view(torch.uint8).copy_(octets.view_as(packed.values))
    assert packed.scale is not None
    powers = torch.arange(packed.scale.numel()).view_as(packed.scale) % 4 - 3
    packed.scale.copy_(10.0**powers).div_(100)
    x_TI = torch.randn(12, 1288, dtype=dtype)
    assert_is_product(skinny.linear(x_TI, skinny.prepare(packed), bias_O), x_TI, packed, bias_O)


_SPLITS = [(1, 4, 12), (1, 8, 41), (1, 16, 3), (2, 8, 41), (4, 1, 12), (2, 1, 3)]


@pytest.mark.parametrize(("wide", "warps", "tokens"), _SPLITS)
@pytest.mark.parametrize(("values", "group"), [(FLOAT, None), (INT4, 64)])
def test_every_split_and_several_passes_are_right(
    emulated: None, wide: int, warps: int, tokens: int, values: str, group: int | None
) -> None:
    torch.manual_seed(0)
    packed, x_TI = packed_weight(40, 1288, values=values, group=group), torch.randn(tokens, 1288).bfloat16()
    tensors = skinny.prepare(packed)
    y_TO = skinny.skinny_linear(x_TI, tensors["blocks"], tensors["form"], None, None, wide, warps)
    assert_is_product(y_TO, x_TI, packed)


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


@pytest.mark.parametrize("values", [FLOAT, INT8, INT4])  # the check itself multiplies inputs, which float8 cannot be
def test_torch_accepts_the_operator(emulated: None, values: str) -> None:
    tensors = skinny.prepare(packed_weight(24, 64, values=values))
    x_TI, bias_O = torch.randn(3, 64).bfloat16(), torch.randn(24).bfloat16()
    arguments = (x_TI, tensors["blocks"], tensors["form"], tensors.get("scale"), bias_O)
    torch.library.opcheck(skinny.skinny_linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_it_refuses_a_gpu_without_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(64, 64, PATTERN, torch.bfloat16, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "(7, 5) is below (8, 0)" in (skinny.unsupported_reason(spec) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for values, group in STORED:
        assert skinny.unsupported_reason(LinearSpec(64, 64, PATTERN, torch.float16, "cuda", values, group)) is None
    assert "32 values share a scale" in (
        skinny.unsupported_reason(LinearSpec(64, 64, PATTERN, torch.float16, "cuda", INT4, 32)) or ""
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("tokens", "strips", "values", "scales"),
    [
        *((tokens, 256, torch.bfloat16, 0) for tokens in (1, 16, 32)),
        *((tokens, 256, CODE_DTYPES[INT8], 0) for tokens in (1, 32)),
        (16, 256, CODE_DTYPES[FP8], 0),
        (1, 256, CODE_DTYPES[INT4], 0),
        *((tokens, 256, CODE_DTYPES[INT4], scales) for tokens in (1, 32) for scales in (1, 2)),
        *((tokens, 1792, CODE_DTYPES[INT4], 2) for tokens in (16, 32)),
    ],
)
def test_all_loads_of_a_chunk_are_16_bytes_wide_and_come_before_its_products(
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: int,
    tokens: int,
    strips: int,
    values: torch.dtype,
    scales: int,
) -> None:
    """Only the scales of a single group a chunk are 8 bytes, as a lane wants two."""
    monkeypatch.setattr(Driver, "capability", capability)
    wide, warps = skinny.split(tokens, strips, 16, has_groups=scales > 0)
    y_TO, words, scale_O = torch.empty(1, 16).bfloat16(), torch.empty(1152, dtype=torch.int32), torch.empty(16)
    constants = {
        **skinny.instructions(torch.bfloat16, values),
        "SCALES": scales,
        "WIDE": wide,
        "EIGHTS": -(-tokens // 8),
    }
    arguments = (words, words, scale_O, y_TO, y_TO, tokens, 16, 32, 1, 1)
    compiled = define_kernel().warmup(*arguments, **constants, WARPS=warps, BIAS=True, num_warps=warps, grid=(1,))
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    run = [str(BIN / "cuobjdump"), "-sass", "-res-usage", str(binary)]
    report = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", report) == ["0"], "registers spill"
    assert "FTZ" not in report, "codes are expanded by way of subnormal floats"
    # With one token bytes in flight are all, so 7 programs of 4 warps are to fit a multiprocessor; else one has to.
    assert int(re.findall(r"REG:(\d+)", report)[0]) <= (72 if tokens == 1 else 65536 // (32 * warps))
    loads_and_products = re.findall(r"LDG\.E\.EF\.\d+|LDG\.E\.128|HMMA\.SP|LDG\.E ", report)
    kinds = [kind for kind in loads_and_products if kind != "LDG.E.128"]
    if constants["EXPAND"]:
        kinds = kinds[: len(kinds) - kinds[::-1].index("HMMA.SP")]  # then come scales of rows, single numbers
    loads = (1 + constants["LOADS"] + (scales > 0)) * wide
    narrow = ["LDG.E.EF.64"] * wide if scales == 1 else []
    assert sorted(kinds[:loads]) == ["LDG.E.EF.128"] * (loads - len(narrow)) + narrow
    assert set(kinds[loads:]) == {"HMMA.SP"} and len(kinds) == loads + 8 * wide * -(-tokens // 8)
    assert loads_and_products.count("LDG.E.128") == 8 * -(-tokens // 8), "an activation load fell apart"
