"""The native CPU kernel beyond the contract: every instruction set, every tail, and no byte read that is not there.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import itertools
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskgen.core.int4 import GROUPS
from maskgen.core.packed import PackedTensor
from maskgen.core.pattern import NMPattern
from maskgen.core.values import INT4, INT8, KINDS
from sparse_serve.kernels import LinearSpec, cpu, supported

PATTERN = NMPattern(2, 4)
SOURCES = Path(__file__).parents[3] / "sparse_serve/kernels/csrc"

if reason := cpu.unsupported_reason(LinearSpec(1, 8, PATTERN, torch.float32, "cpu")):
    pytest.skip(reason, allow_module_level=True)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
HERE = range(torch.ops.sparse_serve_cpu.isa() + 1)
"""Numbers of the instruction sets that run on this processor."""


def packed_weight(rows: int, columns: int, dtype: torch.dtype, values: str, group: int | None = None) -> PackedTensor:
    mask_OI = PATTERN.mask_from_scores(torch.rand(rows, columns))
    return PackedTensor.pack(torch.randn(rows, columns, dtype=dtype), mask_OI, PATTERN).quantised(values, group)


def product(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None, isa: int) -> Tensor:
    scale = tensors.get("scale")
    y_TO: Tensor = torch.ops.sparse_serve_cpu.linear(x_TI, tensors["blocks"], tensors["form"], scale, bias_O, isa)
    return y_TO


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 290),
    columns=st.integers(1, 70).map(lambda groups: 8 * groups) | st.sampled_from([1024, 1032, 1160]),
    tokens=st.integers(0, 20) | st.integers(60, 150),
    dtype=st.sampled_from(list(TOLERANCE)),
    values=st.sampled_from(KINDS),
    group=st.sampled_from(GROUPS),
    seed=st.integers(0, 2**31),
)
def test_every_instruction_set_is_right_at_every_end(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, values: str, group: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    packed = packed_weight(rows, columns, dtype, values, group if values == INT4 else None)
    tensors, bias_O = cpu.prepare(packed), torch.randn(rows, dtype=dtype)
    x_TI = torch.randn(tokens, columns, dtype=dtype)
    weight_OI = packed.unpack().double()
    expected_TO = x_TI.double() @ weight_OI.T + bias_O.double()
    size_TO = x_TI.double().abs() @ weight_OI.abs().T + bias_O.double().abs() + 1e-3
    for isa in HERE:
        y_TO = product(x_TI, tensors, bias_O, isa)
        assert y_TO.dtype == dtype and ((y_TO.double() - expected_TO).abs() <= TOLERANCE[dtype] * size_TO).all()


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("columns", [264, 1032])
def test_a_token_s_result_does_not_depend_on_its_batch_or_the_threads(
    dtype: torch.dtype, values: str, isa: int, columns: int
) -> None:
    """64 tokens (AVX2: 32) and more go another way, in bfloat16 where there are many columns. With AMX, a few go
    AVX-512's."""
    torch.manual_seed(0)
    tensors, x_TI = cpu.prepare(packed_weight(2300, columns, dtype, values)), torch.randn(137, columns, dtype=dtype)
    bias_O, threads = torch.randn(2300, dtype=dtype), torch.get_num_threads()
    whole_TO = product(x_TI, tensors, bias_O, isa)
    two_ways = cpu.ISAS[isa] == "amx" and dtype is torch.bfloat16
    few = (4 if values == "float" else 2) if two_ways else 0
    few_TO = product(x_TI, tensors, bias_O, isa - 1) if few else whole_TO
    assert not few or values == "int4" or not torch.equal(few_TO, whole_TO), "this tells the two ways apart"
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for start, stop in ((0, 1), (3, 4), (5, 9), (20, 37), (7, 71), (0, 137)):
                expected_TO = (whole_TO if stop - start > few else few_TO)[start:stop]
                assert torch.equal(product(x_TI[start:stop], tensors, bias_O, isa), expected_TO)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("tokens", "values"), [(1, "float"), (20, "float"), (90, "float"), (90, "int8"), (1, "int4"), (90, "int4")]
)
def test_two_threads_at_once_agree(tokens: int, values: str) -> None:
    torch.manual_seed(1)
    tensors = cpu.prepare(packed_weight(512, 1024, torch.bfloat16, values))
    x_TI = torch.randn(tokens, 1024).bfloat16()
    expected_TO, differing = cpu.linear(x_TI, tensors, None), []

    def call() -> None:
        differing.extend(not torch.equal(cpu.linear(x_TI, tensors, None), expected_TO) for _ in range(30))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differing) == 60 and not any(differing)


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [3, 70])
def test_inputs_may_lie_anywhere(tokens: int, dtype: torch.dtype, values: str) -> None:
    """Transposed, every second one, at an odd place, the same token again: what counts is the numbers."""
    torch.manual_seed(3)
    tensors, bias_O = cpu.prepare(packed_weight(130, 136, dtype, values)), torch.randn(130, dtype=dtype)
    flat = torch.randn(tokens * 136 * 2 + 1, dtype=dtype)
    for x_TI in (
        flat[1 : tokens * 136 + 1].view(136, tokens).T,
        flat[1:].view(tokens, 272)[:, ::2],
        flat[1 : tokens * 136 + 1].view(tokens, 136),
        flat[:136].expand(tokens, 136),
    ):
        for isa in HERE:
            assert torch.equal(
                product(x_TI, tensors, bias_O, isa), product(x_TI.clone().contiguous(), tensors, bias_O, isa)
            )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_hundreds_of_thousands_of_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    packed, x_TI = packed_weight(16, 8, dtype, "float"), torch.randn(300_001, 8, dtype=dtype)
    expected_TO = x_TI.double() @ packed.unpack().double().T
    tolerance = 3 * TOLERANCE[dtype]
    torch.testing.assert_close(
        cpu.linear(x_TI, cpu.prepare(packed), None).double(), expected_TO, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_input_that_is_not_finite_shows(values: str, bad: float) -> None:
    """It must not turn into a plausible number, and must not touch other tokens."""
    torch.manual_seed(2)
    packed, x_TI = packed_weight(32, 256, torch.float32, values), torch.randn(3, 256)
    weight_OI, tensors = packed.unpack(), cpu.prepare(packed)
    x_TI[1, 5] = bad
    y_TO = cpu.linear(x_TI, tensors, None)
    assert torch.isfinite(y_TO[[0, 2]]).all()
    assert not torch.isfinite(y_TO[1, weight_OI[:, 5] != 0]).any()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("values", ["float", INT8, INT4])
def test_damaged_blocks_are_read_as_something_within_bounds(values: str, isa: int) -> None:
    """No code of a block can point outside of it."""
    torch.manual_seed(0)
    tensors = cpu.prepare(packed_weight(40, 264, torch.bfloat16, values, 64 if values == INT4 else None))
    tensors["blocks"].random_(0, 256)
    for tokens, dtype in itertools.product((1, 3, 9, 40, 70), (torch.bfloat16, torch.float32)):
        y_TO = product(torch.randn(tokens, 264).to(dtype), tensors, None, isa)
        assert y_TO.shape == (tokens, 40)


@pytest.mark.parametrize("isa", HERE)
def test_every_pair_of_int4_codes_is_the_number_it_is(isa: int) -> None:
    """In every place of a block, with a scale of its own for each group."""
    octets = torch.arange(256).to(torch.uint8).repeat(33, 1)
    bitmask = torch.full((33, 128), 0x33, dtype=torch.uint8)
    scale = torch.arange(1, 33 * 8 + 1).float().view(33, 8)
    packed = PackedTensor(octets, bitmask, PATTERN, scale)
    x_TI = torch.eye(1024).bfloat16()
    for rows in (x_TI[:3], x_TI[500:516], x_TI):
        y_TO = product(rows.float(), cpu.prepare(packed), None, isa)
        assert torch.equal(y_TO, rows.float() @ packed.unpack().T)
    assert torch.equal(product(x_TI, cpu.prepare(packed), None, isa), packed.unpack().T.bfloat16())


@pytest.mark.parametrize("isa", HERE)
def test_int8_values_do_not_lose_small_inputs_beside_a_large_one(isa: int) -> None:
    """The large input is pruned; what is left must be as exact as without it."""
    kept_OI = torch.tensor([0, 0, 1, 1]).bool().repeat(16, 32)
    packed = PackedTensor.pack(torch.ones(16, 128), kept_OI, PATTERN).quantised("int8")
    x_TI = torch.full((1, 128), 0.1).bfloat16()
    x_TI[0, 0] = 10_000
    y_TO = product(x_TI, cpu.prepare(packed), None, isa)
    torch.testing.assert_close(y_TO.float(), torch.full((1, 16), 6.406), rtol=4e-3, atol=0)


def test_a_library_that_cannot_be_loaded_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    bad = tmp_path / "bad.so"
    bad.write_bytes(b"not a library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "find_spec", lambda name: type("Spec", (), {"origin": str(bad)}))
        assert "cannot be used here" in (cpu.library_problem.__wrapped__() or "")
        patch.setattr(cpu, "find_spec", lambda name: None)
        assert "was not built" in (cpu.library_problem.__wrapped__() or "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_served_in_float32_stay_two_bytes(dtype: torch.dtype) -> None:
    packed = packed_weight(64, 128, dtype, "float")
    widened = PackedTensor(packed.values.float(), packed.bitmask, PATTERN)
    assert torch.equal(cpu.prepare(widened)["blocks"], cpu.prepare(packed)["blocks"])
    assert cpu.prepare(widened)["form"].dtype is dtype
    exact = packed_weight(64, 128, torch.float32, "float")
    assert cpu.prepare(exact)["form"].dtype is torch.float32


@pytest.mark.parametrize("isa", HERE)
def test_every_float16_is_read_and_written_as_it_is(isa: int) -> None:
    """As value, as activation and as bias; subnormal, largest and infinite ones too."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = every[torch.isfinite(every)]
    kept_OI = torch.tensor([1, 1, 0, 0]).bool().repeat(len(numbers), 2)
    weight_OI = torch.zeros(len(numbers), 8, dtype=torch.float16)
    weight_OI[:, 0] = numbers
    tensors = cpu.prepare(PackedTensor.pack(weight_OI, kept_OI, PATTERN))
    one_TI, zero_TI = torch.eye(8)[:1].half(), torch.zeros(1, 8).half()
    assert torch.equal(product(one_TI, tensors, None, isa)[0], numbers)
    assert torch.equal(product(one_TI.float(), tensors, None, isa)[0], numbers.float())
    assert torch.equal(product(zero_TI, tensors, numbers.contiguous(), isa)[0], numbers)
    ones = cpu.prepare(PackedTensor.pack(torch.ones(1, 8).half(), kept_OI[:1], PATTERN))
    x_TI = torch.zeros(len(every), 8).half()
    x_TI[:, 1] = every
    torch.testing.assert_close(product(x_TI, ones, None, isa)[:, 0], every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
def test_sums_are_rounded_to_float16_as_torch_does(isa: int) -> None:
    torch.manual_seed(5)
    exact = torch.cat([torch.randn(2000) * 2.0**power for power in (-26, -24, -15, -14, 0, 10, 15, 16)])
    packed = PackedTensor.pack(
        exact[:, None].repeat(1, 8), torch.tensor([1, 0, 0, 1]).bool().repeat(len(exact), 2), PATTERN
    )
    y_TO = product(torch.eye(8)[3:4].half(), cpu.prepare(packed), None, isa)
    assert torch.equal(y_TO[0], exact.half())


def test_torch_accepts_the_operator() -> None:
    tensors, x_TI = cpu.prepare(packed_weight(32, 64, torch.float32, "float")), torch.randn(3, 64)
    arguments = (x_TI, tensors["blocks"], tensors["form"], None, torch.randn(32))
    torch.library.opcheck(torch.ops.sparse_serve_cpu.linear.default, arguments)


def test_it_takes_what_a_cpu_serves() -> None:
    for dtype in TOLERANCE:
        assert "cpu" in supported(LinearSpec(4096, 4096, PATTERN, dtype, "cpu"))[0]
    assert cpu.isa() in cpu.ISAS


@pytest.mark.timeout(900)  # minutes of compiling and checking, where others want the processor too
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """The same sources under the sanitizers, in a program whose buffers end where tensors would."""
    program = tmp_path / "sanitize"
    sources = [
        Path(__file__).parent / "sanitize.cpp",
        *(SOURCES / f"{name}.cpp" for name in ("pack", "avx2_int8", "vnni", "amx_int8", *cpu.ISAS)),
    ]
    flags = ["-O1", "-std=c++20", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *isas, wrong, _, _, _ = ran.stdout.split()
    here = list(cpu.ISAS[: HERE.stop])
    here += ["avx2_int8", "vnni", "amx_int8"][: torch.ops.sparse_serve_cpu.int8_isa()]
    assert wrong == "0" and isas == here, "each instruction set of this processor took part"


def test_small_weights_do_not_use_up_the_process_s_memory_ranges() -> None:
    """Linux allows 65,530; one or two for each of a thousand weights of 16 KiB would be felt."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps here")
    packed, before = packed_weight(128, 128, torch.bfloat16, "float"), len(maps.read_text().splitlines())
    kept = [cpu.prepare(packed) for _ in range(1000)]
    assert len(maps.read_text().splitlines()) < before + 100 and len(kept) == 1000
