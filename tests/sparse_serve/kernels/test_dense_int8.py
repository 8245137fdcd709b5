"""The dense int8 layer whose inputs keep 16 bits: against exact arithmetic, at every end, and what it refuses.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_serve.kernels import cpu
from sparse_serve.tuning.timing import torch_threads

SOURCES = Path(__file__).parents[3] / "sparse_serve/kernels/csrc"
LACKING = cpu.dense_int8_problem()
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Of sums and of results, relative."""

pytestmark = pytest.mark.skipif(LACKING is not None, reason=LACKING or "")


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, their scales, and an empty tensor of the form."""
    codes_OI = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return codes_OI, torch.rand(rows) + 0.1, codes_OI.new_empty((rows, 0, columns))


def multiply(x_TI: Tensor, codes_OI: Tensor, scale_O: Tensor, form: Tensor, bias_O: Tensor | None = None) -> Tensor:
    blocks = torch.ops.sparse_serve_cpu.pack_int8(codes_OI)
    y_TO: Tensor = torch.ops.sparse_serve_cpu.dense_int8(x_TI, blocks, form, scale_O, bias_O)
    return y_TO


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 30),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300) | st.sampled_from([64, 128, 320]),  # some that are whole tiles
    dtype=st.sampled_from(list(ROUNDING)),
    biased=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_an_input_loses_what_does_not_fit_into_16_bits(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    codes_OI, scale_O, form = layer(rows, columns)
    x_TI = (torch.randn(tokens, columns) * torch.rand(tokens, 1)).to(dtype)
    bias_O = torch.randn(rows).to(dtype) if biased else None
    y_TO = multiply(x_TI, codes_OI, scale_O, form, bias_O)
    weight_OI = codes_OI.double() * scale_O.double()[:, None]
    added_O = bias_O.double() if bias_O is not None else torch.zeros(rows).double()
    expected_TO = x_TI.double() @ weight_OI.T + added_O
    half_step_T = x_TI.double().abs().amax(1) / (127 * 256 + 127) * 0.5001
    size_TO = x_TI.double().abs() @ weight_OI.abs().T + added_O.abs()
    allowed_TO = half_step_T[:, None] * weight_OI.abs().sum(1) + ROUNDING[dtype] * size_TO + 1e-6
    assert y_TO.shape == (tokens, rows) and y_TO.dtype is dtype
    assert bool(((y_TO.double() - expected_TO).abs() <= allowed_TO).all())


@pytest.mark.parametrize("columns", [576, 2048, 65536])
def test_a_token_s_result_is_its_own(columns: int) -> None:
    """The same bits alone and in a batch of any size, on one thread and on two; with the largest codes there are."""
    torch.manual_seed(0)
    codes_OI, scale_O, form = layer(200, columns)
    codes_OI[:2], codes_OI[2:4] = 127, -127
    x_TI = torch.randn(29, columns, dtype=torch.bfloat16)
    x_TI[0] = x_TI[0].abs().fill_(3)
    y_TO = multiply(x_TI, codes_OI, scale_O, form)
    for count in (1, 2, 3, 7, 13, 28):
        assert torch.equal(multiply(x_TI[:count], codes_OI, scale_O, form), y_TO[:count])
    with torch_threads(1):
        assert torch.equal(multiply(x_TI, codes_OI, scale_O, form), y_TO)
    largest_O = 3 * 127 * columns * scale_O[:4] * torch.tensor([1, 1, -1, -1])
    assert torch.allclose(y_TO[0, :4].float(), largest_O, rtol=0.01)


def test_what_is_no_number_shows_in_its_token_alone() -> None:
    codes_OI, scale_O, form = layer(20, 130)
    x_TI = torch.randn(5, 130)
    before_TO = multiply(x_TI, codes_OI, scale_O, form)
    x_TI[1, 129], x_TI[3, 0], x_TI[4] = torch.nan, -torch.inf, 0
    y_TO = multiply(x_TI, codes_OI, scale_O, form)
    assert bool(y_TO[[1, 3]].isnan().all()) and bool((y_TO[4] == 0).all())
    assert torch.equal(y_TO[[0, 2]], before_TO[[0, 2]])


def test_leading_dimensions_and_strides_are_those_of_any_linear_layer() -> None:
    codes_OI, scale_O, form = layer(20, 64)
    x_TI = torch.randn(6, 64)
    y_TO = multiply(x_TI, codes_OI, scale_O, form)
    assert torch.equal(multiply(x_TI.view(2, 3, 64), codes_OI, scale_O, form), y_TO.view(2, 3, 20))
    assert torch.equal(multiply(x_TI.T.contiguous().T, codes_OI, scale_O, form), y_TO)


def test_what_does_not_fit_together_is_refused() -> None:
    op, pack = torch.ops.sparse_serve_cpu.dense_int8, torch.ops.sparse_serve_cpu.pack_int8
    codes_OI, scale_O, form = layer(32, 256)
    blocks, x_TI = pack(codes_OI), torch.randn(3, 256)
    wide = torch.empty((1, 0, 2**16 + 4), dtype=torch.int8)
    for arguments, message in (
        (
            (torch.randn(3, 255), blocks, form, scale_O, None),
            r"x is Float \[3, 255\], expected \[..., 256\]: the weight",
        ),
        ((x_TI.double(), blocks, form, scale_O, None), "x is Double, expected BFloat16, Half or Float"),
        (
            (x_TI, blocks[1:].clone(), form, scale_O, None),
            r"blocks are Byte \[8191\], expected contiguous Byte \[8192\]",
        ),
        ((x_TI, blocks, form[0], scale_O, None), r"form is Char \[0, 256\], expected Char \[rows, 0, columns\]"),
        ((x_TI, blocks, form.float(), scale_O, None), r"form is Float .*expected Char \[rows, 0, columns\]"),
        ((x_TI, blocks, form, scale_O[1:].clone(), None), r"scale is Float \[31\], expected contiguous Float \[32\]"),
        ((x_TI, blocks, form, scale_O, torch.ones(32).half()), r"bias is Half \[32\], expected contiguous Float"),
        ((torch.randn(1, 2**16 + 4), blocks, wide, scale_O, None), "has 65540 columns, expected 1 to 65536"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    for codes, shown in ((codes_OI.float(), "Float"), (codes_OI.T, "Char .*not contiguous"), (codes_OI[0], "Char")):
        with pytest.raises(RuntimeError, match=f"codes are {shown}.*expected contiguous Char"):
            pack(codes)


@pytest.mark.timeout(600)  # compiling, where others want the processor too
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """The same source under the sanitizers, in a program whose buffers end where tensors would."""
    program, here = tmp_path / "sanitize", Path(__file__).parent
    flags = ["-O1", "-std=c++20", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}"]
    sources = [str(here / "sanitize_dense_int8.cpp"), str(SOURCES / "dense_int8.cpp")]
    subprocess.run(["g++", *flags, *sources, "-o", str(program)], check=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    in_tiles = 81 if torch.ops.sparse_serve_cpu.int8_isa() == 3 else -1
    assert ran.returncode == 0 and ran.stdout == f"0 of 324 and {in_tiles} in tiles wrong\n", ran.stdout + ran.stderr
