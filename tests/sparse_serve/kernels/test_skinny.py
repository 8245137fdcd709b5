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
from maskgen.core.values import FP8, INT4, INT8
from sparse_serve.kernels import LinearSpec, _ptx, skinny
from tests.gpu.emulator import LANES, G, Program, T, from_float, multiply_sparse
from tests.gpu.oracle import PATTERN, STORED, packed_weight

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
TILES = {INT8: 2, FP8: 2, INT4: 4}
"""How many tiles a load of 16 bytes a lane is, by kind of codes."""

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


def expanded(words: NDArray[Any], tile: int, values: str) -> NDArray[Any]:
    """What a load's words `[..., 4]` are multiplied as in one of its tiles, by the layout's words: float32
    `[..., 4 registers, 2]`, codes, or of whole numbers their 512th part."""
    if values == INT4:
        shifts = (4 * np.arange(4)[:, None] + 16 * np.arange(2)).astype(np.uint32)
        return ((words[..., tile, None, None] >> shifts & 15).astype(np.float32) - 8) / 512
    mine = np.ascontiguousarray(words[..., 2 * tile : 2 * tile + 2]).view(np.uint8)
    octets = mine.reshape(*words.shape[:-1], 2, 2, 2)  # register // 2, which of two, register % 2
    octets = np.ascontiguousarray(octets.swapaxes(-1, -2)).reshape(*words.shape[:-1], 4, 2)
    if values == INT8:
        return (octets.astype(np.float32) - 128) / 512
    floats: NDArray[Any] = torch.from_numpy(octets).view(torch.float8_e4m3fn).float().numpy()
    return floats


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize(("values", "tile"), [(values, tile) for values in TILES for tile in range(TILES[values])])
def test_every_code_becomes_its_number_exactly(dtype: str, values: str, tile: int) -> None:
    """In every place a code can have; bits are compared, so -0 has to stay -0."""
    thread, word, byte = np.ogrid[:256, :4, :4]
    octets = ((thread + 91 * word + 37 * byte) % 256).astype(np.uint8)
    fragments = np.zeros((256, 4, 2), np.uint16)
    ptx = ENTRY.replace("BODY", re.sub(r"\$(\d)", r"%r\1", _ptx.expansions(values, dtype)[tile]) + ";")
    Program(ptx).run((1, 1), [octets, fragments])
    numbers = expanded(octets.view(np.uint32)[..., 0], tile, values)
    ok = ~np.isnan(numbers)
    assert ok.sum() == (2048 - 16 if values == FP8 else 2048)
    assert len(np.unique(numbers[ok])) == {INT8: 256, FP8: 253, INT4: 16}[values]
    assert (fragments == from_float(numbers, dtype))[ok].all()


def fragment(words: NDArray[Any], tile: int, values: str, dtype: str) -> NDArray[Any]:
    """A's registers `[S, lanes, 4]` for one tile, from the words of a chunk `[S, words]`, by the layout's words."""
    load, part = divmod(tile, TILES.get(values, 1))
    mine = words[:, 128 * load : 128 * (load + 1)].reshape(-1, 32, 4)
    if values not in TILES:
        return mine
    halves = from_float(expanded(mine, part, values), dtype)
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 32, 4)


def scales_of_groups(words: NDArray[Any]) -> NDArray[Any]:
    """`[S, lanes, groups, 4 registers]` for a lane's sums, from the words `[S, 16 * groups]` behind the values."""
    scales = np.ascontiguousarray(words).view(np.float32).reshape(len(words), 8, -1, 2)  # strip, g, group, row // 8
    return scales[:, G][..., np.arange(4) // 2]


def product_by_fragments(x_TI: Tensor, tensors: dict[str, Tensor], values: str) -> Tensor:
    """Up to 8 tokens, as the kernel's lanes and the tensor core see them."""
    blocks_SCW = tensors["blocks"].numpy().view(np.uint32)
    strips, chunks, _ = blocks_SCW.shape
    kind = DTYPES[x_TI.dtype]
    words_TI = np.zeros((8, chunks * 128), np.uint32)
    words_TI[: len(x_TI), : x_TI.shape[1] // 2] = x_TI.contiguous().view(torch.int32).numpy().view(np.uint32)
    after = 128 + 1024 // TILES.get(values, 1)
    total, sums = np.zeros((2, strips, 32, 4), np.float32)
    for chunk in range(chunks):
        scales = scales_of_groups(blocks_SCW[:, chunk, after:])
        groups = scales.shape[2]
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
            if groups and (tile + 1) * groups % 8 == 0:
                total, sums = total + sums * scales[:, :, tile * groups // 8], np.zeros_like(sums)
    y_OT = np.zeros((strips, 16, 8), np.float32)
    for register in range(4):
        y_OT[:, G + 8 * (register // 2), 2 * T + register % 2] = (total + sums)[:, :, register]
    y_TO = torch.from_numpy(y_OT.reshape(-1, 8)[: len(tensors["form"]), : len(x_TI)].T.copy())
    return y_TO * _ptx.UNITS[values] * tensors.get("scale", torch.ones(1))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 100).map(lambda groups: 8 * groups),
    tokens=st.integers(1, 8),
    dtype=st.sampled_from(list(DTYPES)),
    stored=st.sampled_from(STORED),
    seed=st.integers(0, 2**31),
)
def test_the_layout_is_what_the_tensor_core_reads(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, stored: tuple[str, int | None], seed: int
) -> None:
    torch.manual_seed(seed)
    packed, x_TI = packed_weight(rows, columns, dtype, *stored), torch.randn(tokens, columns, dtype=dtype)
    y_TO = product_by_fragments(x_TI, skinny.prepare(packed), packed.kind)
    expected_TO = x_TI.double() @ packed.unpack().double().T
    torch.testing.assert_close(y_TO.double(), expected_TO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "group", "part"),
    [
        ("float", None, 0.5625),
        ("int8", None, 0.3125),
        ("fp8_e4m3", None, 0.3125),
        ("int4", None, 0.1875),
        ("int4", 128, 0.1953125),
        ("int4", 64, 0.203125),
    ],
)
def test_a_whole_layout_costs_what_the_docstring_says(values: str, group: int | None, part: float) -> None:
    packed = packed_weight(64, 512, values=values, group=group)
    tensors = skinny.prepare(packed)
    scales = 64 * 4 if "scale" in tensors else 0
    assert ("scale" in tensors) == (values != "float" and group is None)
    assert sum(tensor.nbytes for tensor in tensors.values()) == part * packed.dense_nbytes(torch.bfloat16) + scales
    assert tensors["blocks"].is_contiguous() and tensors["form"].nbytes == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device_type": "cpu"}, "device cpu is not an NVIDIA GPU"),
        ({"pattern": NMPattern(4, 8)}, "pattern 4:8 is not 2:4"),
        ({"dtype": torch.float32}, "dtype torch.float32 is not one of"),
        ({"values": INT4, "group": 32}, "32 values share a scale; expected 64, 128 or those of a row"),
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
    grouped = skinny.prepare(packed_weight(24, 64, values=INT4, group=64))
    unscaled = {name: codes[name] for name in ("blocks", "form")}
    for wrong in ({**tensors, "scale": torch.ones(24)}, {**grouped, "scale": torch.ones(24)}, unscaled):
        with pytest.raises(ValueError, match="a scale belongs to codes without scales of groups and to no others"):
            skinny.linear(torch.randn(3, 64).bfloat16(), wrong, None)
