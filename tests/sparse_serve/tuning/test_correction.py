"""The correction beside a sparse layer: both ways against exact arithmetic, at every end, and what is refused.

Legend: T = tokens, O = out features, I = in features, K = columns of S, P = parts of a fused layer.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.correction import CorrectionConfig, LowRankCorrection, PooledCorrection
from sparse_serve.kernels import cpu
from sparse_serve.tuning.correction import CorrectionKernel
from sparse_serve.tuning.timing import torch_threads

SOURCES = Path(__file__).parents[3] / "sparse_serve/kernels/csrc"
SANITIZE = Path(__file__).parents[1] / "kernels/sanitize_correction.cpp"
LACKING = cpu.correction_problem(torch.bfloat16)
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of X x, and of the result, relative."""

native = pytest.mark.skipif(LACKING is not None, reason=LACKING or "")


class Layer:
    """S and X of random numbers, as they are and as a kernel wants them."""

    def __init__(
        self, form: CorrectionConfig, rows: list[int], columns: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.rows, inner = rows, form.columns(columns, "a layer")
        self.out_OK = torch.randn(sum(rows), inner).to(dtype)
        self.pool = torch.randn(len(rows) * inner, columns).to(dtype) if form.stores_pool else None
        self.kernel = CorrectionKernel.of(form, rows, self.out_OK, self.pool)
        self.prepared = self.kernel.prepare(self.out_OK, self.pool)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """x and y."""
        columns = 96 if self.pool is None else self.pool.shape[1]
        dtype = self.out_OK.dtype
        return torch.randn(tokens, columns).to(dtype), torch.randn(tokens, sum(self.rows)).to(dtype)

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return self.kernel.add(x_TI, y_TO, *self.prepared)

    def exact(self, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, Tensor]:
        """The sum in float64, and that of magnitudes."""
        pool = self.pool
        if pool is None:
            pool = torch.eye(self.kernel.inner).repeat_interleave(x_TI.shape[1] // self.kernel.inner, dim=1)
        parts = list(zip(pool.double().chunk(len(self.rows)), self.out_OK.double().split(self.rows), strict=True))
        x, y = x_TI.double(), y_TO.double()
        total = y + torch.cat([x @ x_KI.T @ s_OK.T for x_KI, s_OK in parts], -1)
        size = y.abs() + torch.cat([x.abs() @ x_KI.abs().T @ s_OK.abs().T for x_KI, s_OK in parts], -1)
        return total, size


@settings(max_examples=120, deadline=None)
@given(
    tokens=st.integers(0, 40),
    rows=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    columns=st.integers(1, 150) | st.sampled_from([64, 576]),  # some that are whole tiles
    inner=st.integers(1, 40),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 2**20),
)
def test_it_is_the_sum_of_a_product_of_products(
    tokens: int, rows: list[int], columns: int, inner: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = Layer(LowRankCorrection(inner), rows, columns, dtype)
    x_TI, y_TO = layer.inputs(tokens)
    assert layer.kernel.in_blocks == (dtype is torch.bfloat16 and columns % 2 == 0 and LACKING is None)
    total_TO, (expected_TO, size_TO) = layer.add(x_TI, y_TO), layer.exact(x_TI, y_TO)
    assert total_TO.shape == y_TO.shape and total_TO.dtype is dtype
    assert bool(((total_TO.double() - expected_TO).abs() <= ROUNDING[dtype] * size_TO + 1e-6).all())


@pytest.mark.parametrize(
    "form", [PooledCorrection(16, "fixed"), PooledCorrection(16, "trained"), LowRankCorrection(6)], ids=str
)
def test_every_form_is_what_its_manifest_says(form: CorrectionConfig) -> None:
    torch.manual_seed(0)
    layer = Layer(form, [24], 96)
    x_TI, y_TO = layer.inputs(5)
    expected_TO, size_TO = layer.exact(x_TI, y_TO)
    assert bool(((layer.add(x_TI, y_TO).double() - expected_TO).abs() <= ROUNDING[torch.bfloat16] * size_TO).all())


@pytest.mark.parametrize("tokens", [1, 4, 5, 37])
@pytest.mark.parametrize("inner", [1, 17, 33, 40])
@pytest.mark.parametrize("columns", [34, 96])
def test_whole_numbers_are_exact(tokens: int, inner: int, columns: int) -> None:
    """Every product counts: of numbers -1, 0 and 1 all sums are small, which bfloat16 does not round."""
    torch.manual_seed(0)
    layer = Layer(LowRankCorrection(inner), [40, 16, 150], columns)
    assert layer.pool is not None
    x_TI, y_TO = layer.inputs(tokens)
    for numbers in (layer.out_OK, layer.pool, x_TI, y_TO):
        numbers.copy_(torch.randint(-1, 2, numbers.shape))
    layer.prepared = layer.kernel.prepare(layer.out_OK, layer.pool)
    assert torch.equal(layer.add(x_TI, y_TO), layer.exact(x_TI, y_TO)[0].bfloat16())


@native
@pytest.mark.parametrize("columns", [576, 1530])
def test_a_token_s_result_is_its_own(columns: int) -> None:
    """The same bits alone and in a batch of any size that takes the same instructions, on one thread and on two."""
    torch.manual_seed(0)
    layer = Layer(LowRankCorrection(21), [600, 200, 72], columns)
    x_TI, y_TO = layer.inputs(67)
    for counts in ((1, 2, 3, 4), (5, 7, 16, 66, 67)):
        total_TO = layer.add(x_TI[: counts[-1]], y_TO[: counts[-1]])
        for count in counts:
            assert torch.equal(layer.add(x_TI[:count], y_TO[:count]), total_TO[:count])
        with torch_threads(1):
            assert torch.equal(layer.add(x_TI[: counts[-1]], y_TO[: counts[-1]]), total_TO)


@native
@pytest.mark.parametrize("tokens", [4, 37])
@pytest.mark.parametrize("inner", [4, 17])
def test_what_is_no_number_shows_in_its_token_alone(tokens: int, inner: int) -> None:
    torch.manual_seed(0)
    layer = Layer(LowRankCorrection(inner), [20, 40], 128)
    x_TI, y_TO = layer.inputs(tokens)
    before_TO = layer.add(x_TI, y_TO)
    x_TI[1, 127], x_TI[3, 0] = torch.nan, -torch.inf
    total_TO = layer.add(x_TI, y_TO)
    assert not bool(total_TO[[1, 3]].isfinite().any())
    others = [token for token in range(tokens) if token not in (1, 3)]
    assert torch.equal(total_TO[others], before_TO[others])


@native
def test_leading_dimensions_and_strides_are_those_of_any_linear_layer() -> None:
    torch.manual_seed(0)
    layer = Layer(LowRankCorrection(4), [20], 64)
    x_TI, y_TO = layer.inputs(6)
    total_TO = layer.add(x_TI, y_TO)
    assert torch.equal(layer.add(x_TI.view(2, 3, 64), y_TO.view(2, 3, 20)), total_TO.view(2, 3, 20))
    assert torch.equal(layer.add(x_TI.T.contiguous().T, y_TO.T.contiguous().T), total_TO)


@native
@pytest.mark.parametrize("strided", [False, True])
def test_torch_accepts_the_operator(strided: bool) -> None:
    layer = Layer(LowRankCorrection(4), [20, 40], 64)
    x_TI, y_TO = layer.inputs(3)
    if strided:
        y_TO = y_TO.T.contiguous().T
    out, pool = layer.prepared
    arguments = (y_TO, x_TI, pool, out, layer.rows, 4)
    torch.library.opcheck(torch.ops.sparse_serve_cpu.add_correction.default, arguments)


@native
def test_what_does_not_fit_together_is_refused() -> None:
    op, bf16 = torch.ops.sparse_serve_cpu.add_correction, torch.bfloat16
    y, x, pool = (torch.zeros(size, dtype=bf16) for size in ((3, 40), (3, 64), (2, 32, 16, 2)))
    out, rows = torch.zeros((3 * 3 + 16) * 32, dtype=bf16), [20, 20]
    op(y, x, pool, out, rows, 5)
    for arguments, message in (
        ((y.float(), x, pool, out, rows, 5), r"y is Float \[3, 40\], expected contiguous BFloat16 of 2 dimensions"),
        ((y, x.half(), pool, out, rows, 5), r"x is Half \[3, 64\], expected contiguous BFloat16"),
        ((y, x[:, 1:], pool, out, rows, 5), r"x is BFloat16 \[3, 63\], expected \[..., 64\]: the pool is"),
        ((y[:, 1:], x, pool, out, rows, 5), "rows has 20, expected outputs for each part, together 39"),
        ((y[:2], x, pool, out, rows, 5), r"y is BFloat16 \[2, 40\], expected \[..., 40\] for 3 tokens"),
        ((y, x[0], pool, out, rows, 5), r"y is BFloat16 \[3, 40\], expected contiguous BFloat16 of 1 dimensions"),
        ((y, x, pool.transpose(0, 2), out, rows, 5), r"pool is BFloat16 \[16, 32, 2, 2\], not contiguous, expected"),
        ((y, x, pool[:1], out, rows, 5), r"pool is BFloat16 \[1, 32, 16, 2\], expected \[2, columns / 2, 16, 2\]"),
        ((y, x, pool, out, rows, 17), r"pool is BFloat16 \[2, 32, 16, 2\], expected \[4, columns / 2, 16, 2\]"),
        ((y, x, pool, out, rows, 0), "rows are of 2 parts, and inner is 0, expected parts, and 1 to"),
        ((y, x, pool, out, [], 5), "rows are of 0 parts, and inner is 5, expected parts"),
        ((y, x, pool, out, [40, 0], 5), "rows has 0, expected outputs for each part"),
        ((y, x, pool, out, [-20, 60], 5), "rows has -20, expected outputs for each part"),
        ((y, x, pool, out, [2**63 - 1, 2**63 - 1, 42], 5), "rows has 9223372036854775807, expected .* together 40"),
        ((y, x, pool, out[1:], rows, 5), r"out is BFloat16 \[799\], expected \[800\]: inner is 5"),
        ((y, x, pool, out, rows, 7), r"out is BFloat16 \[800\], expected \[896\]: inner is 7"),
        ((y, x, pool, out.view(1, 800), rows, 5), r"out is BFloat16 \[1, 800\], expected contiguous BFloat16 of 1 dim"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@native
@pytest.mark.timeout(600)  # compiling, where others want the processor too
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """The same source under the sanitizers, in a program whose buffers end where tensors would."""
    program = tmp_path / "sanitize"
    flags = ["-O1", "-std=c++20", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}"]
    sources = [str(SANITIZE), str(SOURCES / "correction.cpp")]
    subprocess.run(["g++", *flags, *sources, "-o", str(program)], check=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    in_tiles = 64 if torch.ops.sparse_serve_cpu.isa() == len(cpu.ISAS) - 1 else -1
    assert ran.returncode == 0 and ran.stdout == f"0 of 320 and {in_tiles} in tiles wrong\n", ran.stdout + ran.stderr
