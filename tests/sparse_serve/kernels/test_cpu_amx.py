"""The native CPU kernel's way with AMX tiles: many groups of tokens, and what a process or thread must not notice.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_serve.kernels import cpu
from tests.sparse_serve.kernels.test_cpu import HERE, packed_weight, product

KINDS_IN_TILES = ("float", "int8", "int4")
AMX, AVX512 = cpu.ISAS.index("amx"), cpu.ISAS.index("avx512")

if AMX not in HERE:
    pytest.skip(f"this processor has {cpu.isa()}, or tiles are kept from this process", allow_module_level=True)

WITHOUT_PERMISSION = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
instructions = [  # of a filter of system calls: is it arch_prctl (158) with 0x1023? then it fails with EPERM
    (0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (0x06, 0, 0, 0x00050001),
    (0x06, 0, 0, 0x7FFF0000),
]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in instructions))
header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(program)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()

import torch
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import LinearSpec, choose, cpu
kernel = choose(LinearSpec(64, 256, NMPattern(2, 4), torch.bfloat16, "cpu"), "cpu")
weight_OI = torch.ones(64, 256).bfloat16()
tensors = kernel.prepare(PackedTensor.pack(weight_OI, NMPattern(2, 4).mask_from_scores(weight_OI), NMPattern(2, 4)))
print(cpu.isa(), kernel.linear(torch.ones(20, 256).bfloat16(), tensors, None).unique().tolist())
rounded = choose(LinearSpec(64, 256, NMPattern(2, 4), torch.bfloat16, "cpu", "int8", activations="int8"), "cpu_int8")
packed = PackedTensor.pack(weight_OI, NMPattern(2, 4).mask_from_scores(weight_OI), NMPattern(2, 4)).quantised("int8")
tensors = rounded.prepare(packed)
print(rounded.linear(torch.ones(20, 256).bfloat16(), tensors, None).unique().tolist())
blocks, form, scale = (tensors[name] for name in ("blocks", "form", "scale"))
try:
    torch.ops.sparse_serve_cpu.linear_int8(torch.ones(20, 256), blocks, form, scale, None, 3)
except RuntimeError as error:
    print("isa is 3, expected -1 (the best here) or 1 to 2" in str(error))
"""


@pytest.mark.parametrize("values", KINDS_IN_TILES)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(530, 300, 1160), (1100, 40, 72), (70, 2100, 520), (33, 130, 9000)]
)
def test_more_tokens_rows_and_columns_than_one_group_takes(tokens: int, rows: int, columns: int, values: str) -> None:
    torch.manual_seed(0)
    packed = packed_weight(rows, columns, torch.bfloat16, values)
    x_TI, bias_O = torch.randn(tokens, columns).bfloat16(), torch.randn(rows).bfloat16()
    weight_OI = packed.unpack().double()
    expected_TO = x_TI.double() @ weight_OI.T + bias_O.double()
    size_TO = x_TI.double().abs() @ weight_OI.abs().T + bias_O.double().abs()
    y_TO = product(x_TI, cpu.prepare(packed), bias_O, AMX)
    assert ((y_TO.double() - expected_TO).abs() <= 5e-3 * size_TO).all()


@pytest.mark.parametrize("values", KINDS_IN_TILES)
def test_sums_differ_from_avx512_s_by_their_rounding_only(values: str) -> None:
    """Whole numbers, whose sums float32 holds: bit for bit the same, in every place of a tile. So is a scale of each
    128 columns of a row, if it is a power of two."""
    torch.manual_seed(1)
    packed = packed_weight(290, 1032, torch.bfloat16, values, 64 if values == "int4" else None)
    whole = packed.values.sign() if values == "float" else packed.values
    scale = torch.randint(-3, 3, (290, 9)).float().exp2() if values == "int4" else packed.scale
    packed = type(packed)(whole, packed.bitmask, packed.pattern, scale)
    tensors, x_TI = cpu.prepare(packed), torch.randint(-8, 9, (83, 1032)).bfloat16()
    assert torch.equal(product(x_TI, tensors, None, AMX), product(x_TI, tensors, None, AVX512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_of_other_dtypes_go_avx512_s_way(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    for values in KINDS_IN_TILES:
        tensors, x_TI = cpu.prepare(packed_weight(130, 264, dtype, values)), torch.randn(70, 264, dtype=dtype)
        assert torch.equal(product(x_TI, tensors, None, AMX), product(x_TI, tensors, None, AVX512))


def test_dense_layers_of_the_same_threads_are_not_disturbed() -> None:
    """torch's own AMX kernels configure tiles too; each side must find, or make again, what it needs."""
    torch.manual_seed(3)
    tensors, weight_OI = cpu.prepare(packed_weight(512, 512, torch.bfloat16, "float")), torch.randn(512, 512).bfloat16()
    for tokens in (1, 5, 40, 129):
        x_TI = torch.randn(tokens, 512).bfloat16()
        dense_TO, sparse_TO = F.linear(x_TI, weight_OI), cpu.linear(x_TI, tensors, None)
        for _ in range(3):
            assert torch.equal(F.linear(x_TI, weight_OI), dense_TO)
            assert torch.equal(cpu.linear(x_TI, tensors, None), sparse_TO)


@pytest.mark.parametrize("values", KINDS_IN_TILES)
@pytest.mark.parametrize("tokens", [5, 15, 16, 50])
def test_what_is_not_finite_stays_with_its_token(tokens: int, values: str) -> None:
    """The tile of a token has those of others, and zeros where there are none."""
    torch.manual_seed(4)
    packed = packed_weight(48, 136, torch.bfloat16, values)
    tensors, x_TI = cpu.prepare(packed), torch.randn(tokens, 136).bfloat16()
    clean_TO: Tensor = cpu.linear(x_TI, tensors, None)
    x_TI[tokens // 2, 135] = torch.nan
    y_TO, others = cpu.linear(x_TI, tensors, None), torch.arange(tokens) != tokens // 2
    assert torch.equal(y_TO[others], clean_TO[others])
    assert y_TO[tokens // 2, packed.unpack()[:, 135] != 0].isnan().all()


def test_a_process_that_may_not_use_tiles_uses_avx512() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT_PERMISSION], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[-4:-1] == ["avx512 [128.0]", "[128.0]", "True"]
