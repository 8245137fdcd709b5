"""Measurements on this machine: every candidate is timed, one that fails is out, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import Kernel, LinearSpec, reference, supported
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning import measure as measuring
from sparse_serve.tuning.measure import DENSE, measure
from sparse_serve.tuning.samples import random_weight
from sparse_serve.tuning.selection import TORCH


@pytest.mark.parametrize("values", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_kernels_that_support_the_layer_and_dense_are_timed(values: str, dtype: torch.dtype) -> None:
    spec = LinearSpec(200, 64, NMPattern(2, 4), dtype, "cpu", values)
    kernels, _ = supported(spec)
    state = torch.get_rng_state()
    found = measure(spec, kernels, (1, 5), TORCH)
    assert torch.equal(state, torch.get_rng_state()), "a server that measures samples the same tokens"
    assert list(found.seconds) == [1, 5] and not found.failed
    assert all(set(times) == {DENSE, *kernels} and min(times.values()) > 0 for times in found.seconds.values())


def test_the_random_weight_is_a_sparse_weight() -> None:
    for values in ("float", "int8", "fp8_e4m3"):
        packed = random_weight(LinearSpec(130, 64, NMPattern(2, 4), torch.bfloat16, "cpu", values))
        packed.verify()
        assert packed.shape == (130, 64)
        assert packed.unpack().float().std(0).min() > 0


def test_a_candidate_that_fails_is_out_with_its_reason() -> None:
    def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        if len(x_TI) > 2:
            raise ValueError("too many")
        return reference.linear(x_TI, tensors, bias_O)

    late: Any = SimpleNamespace(prepare=reference.prepare, linear=linear)
    soon: Any = SimpleNamespace(prepare=lambda packed: packed.nothing, linear=linear)
    spec = LinearSpec(8, 64, NMPattern(2, 4), torch.float32, "cpu")
    found = measure(spec, {"late": cast(Kernel, late), "soon": cast(Kernel, soon)}, (1, 3), TORCH)
    assert [set(times) for times in found.seconds.values()] == [{DENSE}, {DENSE}]
    assert found.failed["late"] == "failed when it was measured: ValueError: 'too many'"
    assert "AttributeError" in found.failed["soon"]


def test_the_traceback_of_a_failure_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each candidate and reason, however many layers meet it."""

    def overflowing(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        raise OverflowError("in the depths of the kernel")

    monkeypatch.setattr(measuring, "_logged", set())
    kernels: Any = {name: SimpleNamespace(prepare=reference.prepare, linear=overflowing) for name in ("one", "two")}
    for rows in (8, 16):
        measure(LinearSpec(rows, 64, NMPattern(2, 4), torch.float32, "cpu"), kernels, (1, 3), TORCH)
    assert [(record.levelname, record.args[0]) for record in caplog.records if record.args] == [  # type: ignore[index]
        ("WARNING", "one"),
        ("WARNING", "two"),
    ]
    assert "in overflowing" in caplog.text and "OverflowError: in the depths of the kernel" in caplog.text


def test_a_candidate_that_fails_while_the_others_run_is_out_too() -> None:
    calls = 0

    def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise MemoryError("late")
        return reference.linear(x_TI, tensors, bias_O)

    late: Any = SimpleNamespace(prepare=reference.prepare, linear=linear)
    kernels = {"late": cast(Kernel, late), "steady": cast(Kernel, reference)}
    found = measure(LinearSpec(8, 64, NMPattern(2, 4), torch.float32, "cpu"), kernels, (3,), TORCH)
    assert set(found.seconds[3]) == {DENSE, "steady"}
    assert found.failed == {"late": "failed when it was measured: MemoryError: 'late'"}


def test_fewer_copies_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(64, 64, NMPattern(2, 4), torch.float32, "cpu")
    packed = random_weight(spec)
    assert measuring._copies(spec, packed, 2) == measuring._MOST_COPIES
    monkeypatch.setattr(measuring.machine, "available_bytes", lambda: 6 * 2 * 2 * packed.dense_nbytes(torch.float32))
    assert measuring._copies(spec, packed, 2) == 6
    monkeypatch.setattr(measuring.machine, "available_bytes", lambda: 1)
    assert measuring._copies(spec, packed, 2) == 1


@pytest.mark.parametrize(("copies", "calls"), [(1, 16), (2, 16), (5, 20), (16, 16), (40, 40)])
def test_on_a_gpu_at_least_sixteen_calls_are_timed_as_one(copies: int, calls: int) -> None:
    spec = LinearSpec(64, 64, NMPattern(2, 4), torch.bfloat16, "cuda")
    assert measuring._calls_in_a_row(spec, copies) == calls
    assert measuring._calls_in_a_row(LinearSpec(64, 64, NMPattern(2, 4), torch.bfloat16, "cpu"), copies) == 1


def test_a_small_layer_has_more_copies_than_a_gpu_s_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_weight(LinearSpec(1024, 1024, NMPattern(2, 4), torch.bfloat16, "cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    copies = measuring._copies(LinearSpec(1024, 1024, NMPattern(2, 4), torch.bfloat16, "cuda"), packed, 4)
    assert copies * packed.nbytes >= measuring.POOL_BYTES


@pytest.mark.parametrize(
    ("dtype", "values"), [(torch.float32, "float"), (torch.float16, "int8"), (torch.bfloat16, "fp8_e4m3")]
)
def test_a_kernel_that_answers_wrongly_is_out(dtype: torch.dtype, values: str) -> None:
    """One output of 1,280 is off by a tenth, or is no number; or all are rows of the wrong weight."""

    def off(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None, by: float = 0.1) -> Tensor:
        y_TO = reference.linear(x_TI, tensors, bias_O)
        y_TO[-1, -1] += by * y_TO.abs().max()
        return y_TO

    linears = {
        "right": reference.linear,
        "off": off,
        "nan": partial(off, by=float("nan")),
        "turned": lambda x_TI, tensors, bias_O: reference.linear(x_TI, tensors, bias_O).flip(1),
        "short": lambda x_TI, tensors, bias_O: reference.linear(x_TI, tensors, bias_O)[:, :-1],
    }
    kernels: Any = {name: SimpleNamespace(prepare=reference.prepare, linear=linear) for name, linear in linears.items()}
    found = measure(LinearSpec(80, 64, NMPattern(2, 4), dtype, "cpu", values), kernels, (1, 16), TORCH)
    assert [set(times) for times in found.seconds.values()] == [{DENSE, "right"}] * 2
    assert set(found.failed) == {"off", "nan", "turned", "short"}
    assert "differs by 0.1 of the largest output, with 1 tokens" in found.failed["off"]
    assert "[1, 79], expected [1, 80]" in found.failed["short"]


def test_a_kernel_that_forgets_a_few_columns_is_out() -> None:
    """8 of 4,096 inputs change an output by little: what is compared must be like a layer's outputs."""

    def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        return reference.linear(torch.cat([x_TI[:, :-8], torch.zeros_like(x_TI[:, -8:])], 1), tensors, bias_O)

    kernels: Any = {"short": SimpleNamespace(prepare=reference.prepare, linear=linear), "reference": reference}
    found = measure(LinearSpec(128, 4096, NMPattern(2, 4), torch.bfloat16, "cpu"), kernels, (16,), TORCH)
    assert set(found.failed) == {"short"}


def test_a_dense_layer_that_fails_leaves_the_others() -> None:
    def broken(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("no primitive")

    def short(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x_TI: x_TI[:2].add_(0) @ weight_OI.T if len(x_TI) < 3 else broken(weight_OI)(x_TI)

    spec = LinearSpec(8, 64, NMPattern(2, 4), torch.float32, "cpu")
    found = measure(spec, {}, (1, 3), {"broken": broken, "short": short, **TORCH})
    assert [set(times) for times in found.seconds.values()] == [{DENSE}, {DENSE}]
    assert set(found.failed) == {"dense broken", "dense short"}
    with pytest.raises(KernelError, match=r"no dense layer \[8, 64\] .* with 3 tokens .*no primitive.* name a kernel"):
        measure(spec, {}, (1, 3), {"short": short})


def test_the_fastest_dense_layer_counts() -> None:
    def slow(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x_TI: sum(x_TI @ weight_OI.T for _ in range(30))  # type: ignore[return-value]

    spec = LinearSpec(256, 256, NMPattern(2, 4), torch.float32, "cpu")
    alone, both = measure(spec, {}, (16,), {"slow": slow}), measure(spec, {}, (16,), {"slow": slow, **TORCH})
    assert both.seconds[16][DENSE] < alone.seconds[16][DENSE] / 2
