"""The GPU decode kernel without a GPU or Triton: its layout against the PTX ISA, its codes, what it refuses.

Legend: T = tokens, O = out features, I = in features, S = strips, C = chunks, W = words.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from maskgen.core.pattern import NMPattern
from maskgen.core.values import FP8, INT8
from sparse_serve.kernels import LinearSpec, _ptx, skinny
from tests.gpu.emulator import LANES, G, Program, T, from_float, multiply_sparse
from tests.gpu.oracle import PATTERN, packed_weight

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
CODES = [INT8, FP8]
SPEC = LinearSpec(64, 64, PATTERN, torch.bfloat16, "cuda")

ENTRY = """.visible .entry expand(.param .u64 expand_param_0, .param .u64 expand_param_1)
.reqntid 256
{
ld.param.b64 %rd1, [expand_param_0];
ld.param.b64 %rd2, [expand_param_1];
mov.u32 %r8, %tid.x;
mad.wide.u32 %rd1, %r8, 16, %rd1;
mad.wide.u32 %rd2, %r8, 16, %rd2;
ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1];
BODY
st.global.v4.b32 [%rd2], {%r0, %r1, %r2, %r3};
ret;
}
$L__func_end0:
"""
"""A kernel around one expansion, whose operands are its registers."""


def expanded(octets: NDArray[Any], values: str) -> NDArray[Any]:
    """What bytes of the layout are multiplied as, float32: codes, or of int8 their 512th part."""
    if values == INT8:
        return (octets.astype(np.float32) - 128) / 512
    floats: NDArray[Any] = torch.from_numpy(octets.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    return floats


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("values", CODES)
@pytest.mark.parametrize("tile", [0, 1])
def test_every_code_becomes_its_number_exactly(dtype: str, values: str, tile: int) -> None:
    """In every place a code can have; bits are compared, so -0 has to stay -0."""
    thread, word, byte = np.ogrid[:256, :4, :4]
    octets = ((thread + 91 * word + 37 * byte) % 256).astype(np.uint8)
    fragments = np.zeros((256, 4, 2), np.uint16)
    ptx = ENTRY.replace("BODY", re.sub(r"\$(\d)", r"%r\1", _ptx.expansions(values, dtype)[tile]) + ";")
    Program(ptx).run((1, 1), [octets, fragments])
    mine = octets[:, 2 * tile : 2 * tile + 2].reshape(256, 2, 2, 2)  # thread, word, which of two, register % 2
    numbers = expanded(mine.swapaxes(2, 3).reshape(256, 4, 2), values)
    ok = ~np.isnan(numbers)
    assert ok.sum() == (2048 if values == INT8 else 2048 - 16) and len(np.unique(numbers[ok])) >= 253
    assert (fragments == from_float(numbers, dtype))[ok].all()


def fragment(words: NDArray[Any], tile: int, values: str, dtype: str) -> NDArray[Any]:
    """A's registers `[S, lanes, 4]` for one tile, from the words of a chunk `[S, words]`, by the docstring's words."""
    if values not in CODES:
        return words[:, 128 * tile : 128 * (tile + 1)].reshape(-1, 32, 4)
    mine = np.ascontiguousarray(words[:, 128 * (tile // 2) : 128 * (tile // 2 + 1)]).reshape(-1, 32, 2, 2)
    octets = np.ascontiguousarray(mine[:, :, tile % 2]).view(np.uint8).reshape(-1, 32, 2, 2, 2)
    halves = from_float(expanded(octets.swapaxes(3, 4), values), dtype)
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 32, 4)


def product_by_fragments(x_TI: Tensor, tensors: dict[str, Tensor], values: str) -> Tensor:
    """Up to 8 tokens, as the kernel's lanes and the tensor core see them."""
    blocks_SCW = tensors["blocks"].numpy().view(np.uint32)
    strips, chunks, _ = blocks_SCW.shape
    kind = DTYPES[x_TI.dtype]
    words_TI = np.zeros((8, chunks * 128), np.uint32)
    words_TI[: len(x_TI), : x_TI.shape[1] // 2] = x_TI.contiguous().view(torch.int32).numpy().view(np.uint32)
    sums = np.zeros((strips, 32, 4), np.float32)
    for chunk in range(chunks):
        codes = blocks_SCW[:, chunk, :128].reshape(strips, 32, 4)
        for tile in range(8):
            a = fragment(blocks_SCW[:, chunk, 128:], tile, values, kind)
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
    y_TO = torch.from_numpy(y_OT.reshape(-1, 8)[: len(tensors["form"]), : len(x_TI)].T.copy())
    return y_TO * _ptx.UNITS[values] * tensors.get("scale", torch.ones(1))


@settings(max_examples=90, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 100).map(lambda groups: 8 * groups),
    tokens=st.integers(1, 8),
    dtype=st.sampled_from(list(DTYPES)),
    values=st.sampled_from(skinny.VALUES),
    seed=st.integers(0, 2**31),
)
def test_the_layout_is_what_the_tensor_core_reads(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, values: str, seed: int
) -> None:
    torch.manual_seed(seed)
    packed, x_TI = packed_weight(rows, columns, dtype, values), torch.randn(tokens, columns, dtype=dtype)
    y_TO = product_by_fragments(x_TI, skinny.prepare(packed), values)
    expected_TO = x_TI.double() @ packed.unpack().double().T
    torch.testing.assert_close(y_TO.double(), expected_TO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("values", "part"), [("float", 0.5625), ("int8", 0.3125), ("fp8_e4m3", 0.3125)])
def test_a_whole_layout_costs_what_the_docstring_says(values: str, part: float) -> None:
    packed = packed_weight(64, 512, values=values)
    tensors = skinny.prepare(packed)
    scales = 0 if values == "float" else 64 * 4
    assert sum(tensor.nbytes for tensor in tensors.values()) == part * packed.dense_nbytes(torch.bfloat16) + scales
    assert tensors["blocks"].is_contiguous() and tensors["form"].nbytes == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device_type": "cpu"}, "device cpu is not an NVIDIA GPU"),
        ({"pattern": NMPattern(4, 8)}, "pattern 4:8 is not 2:4"),
        ({"dtype": torch.float32}, "dtype torch.float32 is not one of"),
    ],
)
def test_it_says_why_it_refuses(changed: dict[str, Any], reason: str) -> None:
    assert reason in (skinny.unsupported_reason(LinearSpec(**{**SPEC.__dict__, **changed})) or "")


def test_importing_it_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; from sparse_serve.kernels import skinny; "
        "problem = skinny._problem(); assert problem and 'Gluon' in problem, problem"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_does_not_fit_together_is_an_error() -> None:
    tensors = skinny.prepare(packed_weight(24, 64))
    for wrong in (torch.randn(3, 56).bfloat16(), torch.randn(3, 64).half()):
        with pytest.raises(ValueError, match=r"x is .*, expected torch.bfloat16 \[..., 64\]"):
            skinny.linear(wrong, tensors, None)
    for bias_O in (torch.randn(23).bfloat16(), torch.randn(24)):
        with pytest.raises(ValueError, match=r"bias is .*, expected contiguous torch.bfloat16 \[24\]"):
            skinny.linear(torch.randn(3, 64).bfloat16(), tensors, bias_O)
    with pytest.raises(
        ValueError, match=r"x is torch.float32 .*, expected torch.bfloat16 or torch.float16 \[..., 64\]"
    ):
        skinny.linear(torch.randn(3, 64), skinny.prepare(packed_weight(24, 64, values=INT8)), None)
    codes = skinny.prepare(packed_weight(24, 64, values=INT8))
    for scale_O in (torch.ones(23), torch.ones(24).half(), torch.ones(48)[::2]):
        with pytest.raises(ValueError, match=r"scale is .*, expected contiguous float32 \[24\]"):
            skinny.linear(torch.randn(3, 64).bfloat16(), {**codes, "scale": scale_O}, None)
    for wrong in ({**tensors, "scale": torch.ones(24)}, {name: codes[name] for name in ("blocks", "form")}):
        with pytest.raises(ValueError, match="a scale belongs to 8-bit values and to no others"):
            skinny.linear(torch.randn(3, 64).bfloat16(), wrong, None)
