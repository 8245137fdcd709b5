"""Every file of `kernels/` keeps the contract: right numbers, no silent fallback, a custom op torch.compile accepts.

The oracle is a dense matmul in float64 on fresh random weights, of the inputs that the kernel says it multiplies. A
kernel that refuses this machine is reported as skipped, with its reason.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparse_serve.kernels as folder
from maskgen.core.int4 import GROUPS
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.registry import names
from maskgen.core.values import FLOAT, INT4, INT8, KINDS
from sparse_serve.kernels import Kernel, LinearSpec, choose, multiplied, supported
from sparse_serve.runtime.errors import KernelError

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(1, 2)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def packed_weight(
    out_features: int,
    in_features: int,
    pattern: NMPattern,
    dtype: torch.dtype,
    values: str = FLOAT,
    group: int | None = None,
) -> PackedTensor:
    weight_OI = torch.randn(out_features, in_features, dtype=dtype)
    mask_OI = pattern.mask_from_scores(torch.rand(out_features, in_features))
    return PackedTensor.pack(weight_OI, mask_OI, pattern).quantised(values, group)


def kernel_or_skip(name: str, packed: PackedTensor, dtype: torch.dtype | None = None) -> Kernel:
    dtype = dtype or packed.values.dtype
    spec = LinearSpec(*packed.shape, packed.pattern, dtype, packed.values.device.type, packed.kind, packed.group, INT8)
    try:
        return choose(spec, name)
    except KernelError as error:
        pytest.skip(str(error))


def patterns_or_skip(name: str, dtype: torch.dtype, values: str) -> list[NMPattern]:
    specs = {pattern: LinearSpec(64, 64, pattern, dtype, "cpu", values, activations=INT8) for pattern in PATTERNS}
    taken = [pattern for pattern, spec in specs.items() if name in supported(spec)[0]]
    if not taken:
        pytest.skip(f"{name}: {supported(specs[PATTERNS[0]])[1][name]}")
    return taken


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("values", KINDS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_dense_in_float64(name: str, dtype: torch.dtype, values: str, data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from(patterns_or_skip(name, dtype, values)))
    rows, columns = data.draw(st.integers(1, 70)), 8 * data.draw(st.integers(1, 48))
    leading = data.draw(st.sampled_from([(0,), (1,), (3,), (17,), (64,), (2, 5)]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    group = data.draw(st.sampled_from(GROUPS)) if values == INT4 else None
    packed = packed_weight(rows, columns, pattern, dtype, values, group)
    kernel = kernel_or_skip(name, packed, dtype)
    bias_O = torch.randn(rows, dtype=dtype) if data.draw(st.booleans()) else None
    x_TI = torch.randn(*leading, columns, dtype=dtype)
    y_TO = kernel.linear(x_TI, kernel.prepare(packed), bias_O)
    inputs_TI = multiplied(kernel, x_TI)
    expected = inputs_TI @ packed.unpack().double().T + (0 if bias_O is None else bias_O.double())
    assert y_TO.dtype == dtype
    assert y_TO.shape == (*leading, rows)
    scale = (inputs_TI.abs() @ packed.unpack().double().abs().T) + 1.0
    assert ((y_TO.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize("values", [FLOAT, INT8])
def test_inputs_that_are_not_contiguous(name: str, values: str) -> None:
    packed = packed_weight(16, 32, NMPattern(2, 4), torch.float32, values)
    kernel = kernel_or_skip(name, packed, torch.float32)
    x_IT = torch.randn(32, 6)
    tensors = kernel.prepare(packed)
    torch.testing.assert_close(kernel.linear(x_IT.T, tensors, None), kernel.linear(x_IT.T.contiguous(), tensors, None))


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize(("values", "most"), [("float", 0.65), ("int8", 0.4), ("fp8_e4m3", 0.4), ("int4", 0.25)])
def test_stays_compressed(name: str, values: str, most: float) -> None:
    packed = packed_weight(64, 256, NMPattern(2, 4), torch.bfloat16, values)
    tensors = kernel_or_skip(name, packed, torch.bfloat16).prepare(packed)
    if (name, values) == ("cpu", "fp8_e4m3"):  # kept as the 16-bit numbers they are
        most = 0.65
    assert sum(tensor.nbytes for tensor in tensors.values()) <= most * packed.dense_nbytes(torch.bfloat16)


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize("values", KINDS)
def test_is_a_custom_op_that_torch_can_trace(name: str, values: str) -> None:
    packed = packed_weight(16, 32, NMPattern(2, 4), torch.float32, values)
    kernel = kernel_or_skip(name, packed, torch.float32)
    tensors = kernel.prepare(packed)

    def run(x_TI: torch.Tensor) -> torch.Tensor:
        return kernel.linear(x_TI, tensors, None)

    x_TI = torch.randn(5, 32)
    program = torch.export.export(_Wrap(run), (x_TI,)).module()
    torch.testing.assert_close(program(x_TI), run(x_TI))


@pytest.mark.parametrize("name", names(folder))
@pytest.mark.parametrize("values", [FLOAT, INT8])
def test_repeated_runs_are_bit_identical(name: str, values: str) -> None:
    packed = packed_weight(48, 64, NMPattern(2, 4), torch.float32, values)
    kernel = kernel_or_skip(name, packed, torch.float32)
    tensors, x_TI = kernel.prepare(packed), torch.randn(9, 64)
    first = kernel.linear(x_TI, tensors, None)
    assert all(torch.equal(first, kernel.linear(x_TI, tensors, None)) for _ in range(3))


def test_a_kernel_asked_for_by_name_never_falls_back() -> None:
    spec = LinearSpec(8, 8, NMPattern(2, 4), torch.int8, "cpu")
    with pytest.raises(KernelError, match=r"no kernel for a 2:4 weight \[8, 8\].*reference: dtype torch.int8"):
        choose(spec, "reference")
    with pytest.raises(KernelError, match="no 'fastest' in kernels; expected one of"):
        choose(spec, "fastest")


def test_every_kernel_is_willing_or_says_why() -> None:
    kernels, reasons = supported(LinearSpec(64, 64, NMPattern(2, 4), torch.float32, "cpu"))
    assert sorted([*kernels, *reasons]) == names(folder)
    assert "reference" in kernels and all(reasons.values())


class _Wrap(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.function(x_TI)
