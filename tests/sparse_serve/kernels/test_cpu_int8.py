"""The CPU kernel with activations rounded to int8, beyond the contract: only where allowed, and nothing else is.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.int4 import GROUPS
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import INT4, INT8
from sparse_serve.kernels import LinearSpec, choose, cpu, cpu_int8, supported
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning.timing import torch_threads

PATTERN = NMPattern(2, 4)
SPEC = LinearSpec(64, 128, PATTERN, torch.bfloat16, "cpu", INT8, activations=INT8)

HERE = range(1, torch.ops.sparse_serve_cpu.int8_isa() + 1) if cpu.library_problem() is None else range(0)
"""The instruction sets for rounded activations that this processor has, by their number in `cpu.ISAS`."""

needs_kernel = pytest.mark.skipif(
    cpu_int8.unsupported_reason(SPEC) is not None, reason=cpu_int8.unsupported_reason(SPEC) or ""
)
needs_several = pytest.mark.skipif(len(HERE) < 2, reason="this processor has one instruction set for it, or none")


def product(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None, isa: int) -> Tensor:
    scale = tensors.get("scale")
    y_TO: Tensor = torch.ops.sparse_serve_cpu.linear_int8(x_TI, tensors["blocks"], tensors["form"], scale, bias_O, isa)
    return y_TO


def packed_weight(rows: int, columns: int, values: str = INT8, group: int | None = None) -> PackedTensor:
    mask_OI = PATTERN.mask_from_scores(torch.rand(rows, columns))
    return PackedTensor.pack(torch.randn(rows, columns), mask_OI, PATTERN).quantised(values, group)


@needs_kernel
def test_activations_are_rounded_only_where_that_is_allowed() -> None:
    reason = supported(replace(SPEC, activations="float"))[1]["cpu_int8"]
    assert reason.startswith('activations are not to be rounded to int8 ("activations": "int8" allows it)')
    with pytest.raises(KernelError, match="not to be rounded"):
        choose(replace(SPEC, activations="float"), "cpu_int8")
    with pytest.raises(KernelError, match=r"activations are 'int4', expected one of \['float', 'int8'\]"):
        replace(SPEC, activations="int4")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"values": "float"}, "values float are none of"),
        ({"values": "fp8_e4m3"}, "values fp8_e4m3 are none of"),
        ({"pattern": NMPattern(1, 4)}, "pattern 1:4 is not 2:4"),
        ({"device_type": "cuda"}, "device cuda is not cpu"),
    ],
)
def test_what_it_cannot_serve_is_refused(changed: dict[str, object], reason: str) -> None:
    assert reason in (cpu_int8.unsupported_reason(replace(SPEC, **changed)) or "")  # type: ignore[arg-type]


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 290),
    columns=st.integers(1, 70).map(lambda groups: 8 * groups)
    | st.sampled_from([1016, 1024, 1032, 1160, 4088, 4096, 4328]),
    tokens=st.integers(0, 30) | st.integers(120, 140) | st.just(300),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    values=st.sampled_from([INT8, INT4]),
    group=st.sampled_from(GROUPS),
    seed=st.integers(0, 2**31),
)
def test_only_the_inputs_are_rounded(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, values: str, group: int | None, seed: int
) -> None:
    """Beyond what it says it multiplies, an output is off by a few roundings of its own size to float32, and one to
    its dtype: sums of codes are exact."""
    torch.manual_seed(seed)
    packed = packed_weight(rows, columns, values, group if values == INT4 else None)
    x_TI, bias_O = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    y_TO = cpu_int8.linear(x_TI, cpu_int8.prepare(packed), bias_O).double()
    inputs_TI, weight_OI = cpu_int8.multiplied(x_TI), packed.unpack().double()
    size_TO = inputs_TI.abs() @ weight_OI.abs().T + bias_O.double().abs()
    error_TO = (y_TO - (inputs_TI @ weight_OI.T + bias_O.double())).abs()
    steps = 4 + columns // 128  # sums of 128 columns, or more of int8 values, are added in float32
    assert (error_TO <= steps * 2**-23 * size_TO + torch.finfo(dtype).eps * (error_TO + y_TO.abs())).all()


@needs_several
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 300) | st.just(2100),
    columns=st.integers(1, 40).map(lambda groups: 8 * groups)
    | st.sampled_from([1024, 1032, 1160, 1928, 4104, 4328, 4456]),
    tokens=st.integers(1, 40) | st.integers(60, 150) | st.sampled_from([530, 1100]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    values=st.sampled_from([INT8, INT4]),
    group=st.sampled_from(GROUPS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_every_instruction_set_gives_the_same_bits(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, values: str, group: int | None, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = cpu_int8.prepare(packed_weight(rows, columns, values, group if values == INT4 else None))
    x_TI, bias_O = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    for each_O in (None, bias_O):
        with torch_threads(threads):
            best_TO, *others = (product(x_TI, tensors, each_O, isa) for isa in reversed(HERE))
        assert all(torch.equal(best_TO, other_TO) for other_TO in others)


@needs_several
@pytest.mark.parametrize("values", [INT8, INT4])
@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize("inputs", [264, 1032])
def test_instruction_sets_agree_on_what_is_extreme(values: str, tokens: int, inputs: int) -> None:
    """Inputs that are not finite or next to nothing, codes at the ends of their range, scales that are tiny."""
    torch.manual_seed(0)
    packed = packed_weight(40, inputs, values, 64 if values == INT4 else None)
    assert packed.scale is not None
    packed.scale[::3] *= 1e-38
    packed.values[::2] = 0x88 if values == INT4 else -128
    x_TI = torch.randn(tokens, inputs)
    x_TI[0, 3], x_TI[tokens // 2, 200], x_TI[-1, 8:] = torch.inf, torch.nan, 1e-33
    for dtype in (torch.bfloat16, torch.float32):
        tensors = cpu_int8.prepare(packed)
        best_TO, *others = (product(x_TI.to(dtype), tensors, None, isa) for isa in reversed(HERE))
        for other_TO in others:
            assert torch.equal(best_TO.isnan(), other_TO.isnan())
            assert torch.equal(best_TO.nan_to_num(), other_TO.nan_to_num())


@needs_kernel
@pytest.mark.parametrize("values", [INT8, INT4])
@pytest.mark.parametrize("inputs", [264, 1032])
def test_damaged_blocks_are_read_as_something_within_bounds(values: str, inputs: int) -> None:
    """No code of a block can point outside of it; what no pair has a number for counts as zero."""
    torch.manual_seed(0)
    tensors = cpu_int8.prepare(packed_weight(40, inputs, values, 64 if values == INT4 else None))
    tensors["blocks"].random_(0, 256)
    for isa in HERE:
        for tokens in (2, 9, 40):
            y_TO = product(torch.randn(tokens, inputs).bfloat16(), tensors, None, isa)
            assert y_TO.shape == (tokens, 40)


@needs_kernel
@pytest.mark.parametrize(("inputs", "together"), [(256, 128), (896, 128), (1024, 256), (4096, 512)])
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_an_input_moves_by_half_a_step_of_those_beside_it_at_most(
    seed: int, dtype: torch.dtype, inputs: int, together: int
) -> None:
    torch.manual_seed(seed)
    x_TI = (torch.randn(5, inputs) * torch.tensor([1e-3, 1.0, 30.0, 1e-6, 0.0])[:, None]).to(dtype)
    x_TI[:, 200] *= 100  # an outlier
    moved_TI = (cpu_int8.multiplied(x_TI) - x_TI.double()).abs().unflatten(1, (-1, together))
    largest = x_TI.double().abs().unflatten(1, (-1, together)).amax(2, keepdim=True)
    assert (moved_TI <= largest / 254 * (1 + 1e-5)).all()


@needs_kernel
@pytest.mark.parametrize("inputs", [384, 1160])
@pytest.mark.parametrize(("values", "group"), [(INT8, None), (INT4, 64)])
def test_a_token_does_not_depend_on_its_batch_nor_on_threads(values: str, group: int | None, inputs: int) -> None:
    torch.manual_seed(0)
    tensors = cpu_int8.prepare(packed_weight(600, inputs, values, group))
    x_TI = torch.randn(270, inputs).bfloat16()
    with torch_threads(1):
        whole_TO = cpu_int8.linear(x_TI, tensors, None)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert torch.equal(whole_TO, cpu_int8.linear(x_TI, tensors, None))
            for first, last in ((0, 1), (1, 3), (7, 31), (100, 229)):
                assert torch.equal(whole_TO[first:last], cpu_int8.linear(x_TI[first:last], tensors, None))


@needs_kernel
def test_inputs_that_are_not_finite_show_in_their_token_alone() -> None:
    torch.manual_seed(0)
    packed, bias_O = packed_weight(40, 256), torch.randn(40)
    x_TI = torch.randn(6, 256)
    alone_TO = cpu_int8.linear(x_TI, cpu_int8.prepare(packed), bias_O)
    x_TI[1, 3], x_TI[3, 200], x_TI[4, 0], x_TI[5] = torch.nan, torch.inf, -torch.inf, 1e-38
    y_TO = cpu_int8.linear(x_TI, cpu_int8.prepare(packed), bias_O)
    assert y_TO[[1, 3, 4]].isnan().all() and cpu_int8.multiplied(x_TI)[[1, 3, 4]].isnan().sum(1).eq(128).all()
    assert torch.equal(y_TO[[0, 2]], alone_TO[[0, 2]])
    assert torch.equal(y_TO[5], bias_O), "next to nothing counts as zero"


@needs_kernel
def test_the_largest_sums_do_not_overflow() -> None:
    """All codes at an end of their range; a file may hold -128, too."""
    packed = packed_weight(16, 4096)
    for code in (127, -128):
        extreme = PackedTensor(torch.full_like(packed.values, code), packed.bitmask, PATTERN, torch.ones(16))
        for sign in (1, -1):
            for isa, tokens in itertools.product(HERE, (2, 9)):
                y_TO = product(torch.full((tokens, 4096), float(sign)), cpu_int8.prepare(extreme), None, isa)
                torch.testing.assert_close(y_TO, torch.full((tokens, 16), sign * code * 2048.0), rtol=1e-6, atol=0)


@needs_kernel
def test_wrong_tensors_are_refused() -> None:
    packed = packed_weight(16, 64)
    tensors, x_TI = cpu_int8.prepare(packed), torch.randn(2, 64)
    with pytest.raises(RuntimeError, match=r"x is Float \[2, 56\], expected \[..., 64\]"):
        cpu_int8.linear(x_TI[:, :56], tensors, None)
    with pytest.raises(RuntimeError, match="scale is missing"):
        cpu_int8.linear(x_TI, {name: tensors[name] for name in ("blocks", "form")}, None)
    mask_OI = PATTERN.mask_from_scores(torch.rand(16, 64))
    floats = cpu_int8.prepare(PackedTensor.pack(torch.randn(16, 64), mask_OI, PATTERN))
    with pytest.raises(RuntimeError, match="values are Float, expected Char or Byte"):
        cpu_int8.linear(x_TI, floats, None)


@needs_kernel
@pytest.mark.parametrize("isa", [-2, 0, HERE.stop, 4, 1 << 40])
def test_an_instruction_set_that_is_not_here_is_refused(isa: int) -> None:
    tensors = cpu_int8.prepare(packed_weight(16, 64))
    expected = rf"isa is {isa}, expected -1 \(the best here\) or 1 to {HERE.stop - 1}: of AVX2, AVX-512"
    with pytest.raises(RuntimeError, match=expected):
        product(torch.randn(2, 64), tensors, None, isa)


@needs_kernel
def test_torch_accepts_the_operator() -> None:
    tensors, x_TI = cpu_int8.prepare(packed_weight(32, 64)), torch.randn(3, 64)
    arguments = (x_TI, tensors["blocks"], tensors["form"], tensors["scale"], torch.randn(32))
    torch.library.opcheck(torch.ops.sparse_serve_cpu.linear_int8.default, arguments)
