"""A race on this machine: everybody takes part, whoever is hopeless is let go, and nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from maskgen.core.pattern import NMPattern
from sparse_serve import race as module
from sparse_serve.kernels import Kernel, LinearSpec, willing
from sparse_serve.race import DENSE, race, random_weight


@pytest.mark.parametrize("values", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_willing_kernels_and_dense_are_timed(values: str, dtype: torch.dtype) -> None:
    spec = LinearSpec(200, 64, NMPattern(2, 4), dtype, "cpu", values)
    kernels, _ = willing(spec)
    state = torch.get_rng_state()
    found = race(spec, kernels, (1, 5))
    assert torch.equal(state, torch.get_rng_state()), "a server that measures samples the same tokens"
    assert list(found) == [1, 5]
    assert all(set(times) == {DENSE, *kernels} and min(times.values()) > 0 for times in found.values())


def test_the_random_weight_is_a_sparse_weight() -> None:
    for values in ("float", "int8", "fp8_e4m3"):
        packed = random_weight(LinearSpec(130, 64, NMPattern(2, 4), torch.bfloat16, "cpu", values))
        packed.verify()
        assert packed.shape == (130, 64)
        assert packed.unpack().float().std(0).min() > 0


def test_a_hopeless_contender_is_let_go_after_a_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def linear(x_TI: Tensor, tensors: dict[str, Tensor], bias_O: Tensor | None) -> Tensor:
        calls.append(len(x_TI))
        for _ in range(50):
            y_TO = x_TI @ torch.ones(64, 4096)
        return y_TO

    slow: Any = SimpleNamespace(prepare=lambda packed: {}, linear=linear)
    spec = LinearSpec(8, 64, NMPattern(2, 4), torch.float32, "cpu")
    monkeypatch.setattr(module, "BUDGET_S", 0.05)
    found = race(spec, {"slow": cast(Kernel, slow)}, (3,))
    assert calls == 6 * [3]
    assert found[3]["slow"] > module.HOPELESS * found[3][DENSE]
