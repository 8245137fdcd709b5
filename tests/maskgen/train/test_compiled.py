"""Compiled training: the same numbers but for rounding, and only where it pays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from maskgen.methods.learned.adaptive_sparse import AdaptiveSparse
from maskgen.numerics.annealed_adamw import update
from maskgen.recipes.sections import Training
from maskgen.train import compiled
from maskgen.train.compiled import compile_session, pays
from maskgen.train.objective import slice_losses
from tests.maskgen.training import corpus, session, state

LONG = Training(steps=100, batch=8, window_tokens=256)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_run_learns_what_the_run_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is captured; that C++ of it computes the same is tested of its smaller parts only, for time."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    method = AdaptiveSparse(slorb_segment=8)
    plain, fused = session(method, distill_weight=0.5), session(method, distill_weight=0.5)
    assert fused.objective.teacher is not None
    compile_session(fused, fused.model.model.layers, 4)
    assert fused.model.config._attn_implementation == fused.objective.teacher.config._attn_implementation == "eager"
    for _ in range(4):
        one, other = plain.run_step(corpus(), 4), fused.run_step(corpus(), 4)
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.divergence == pytest.approx(one.divergence, rel=1e-3, abs=1e-6)
    found, expected = state(fused), state(plain)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-2, atol=2e-3, msg=name)
    assert counters["stats"]["unique_graphs"] >= 4, "student, teacher, loss and update"


@pytest.mark.filterwarnings("ignore")
def test_the_update_in_cpp_is_the_update() -> None:
    fused = torch.compile(update, dynamic=True)
    factors = torch.tensor([0.5, 0.3, 1e-2, 1e-3, 0.1])
    for count in (64, 1000):
        generator = torch.Generator().manual_seed(count)
        one = [torch.rand(count, generator=generator) for _ in range(4)]
        kept = torch.rand(count, generator=generator) > 0.5
        other = [tensor.clone() for tensor in one]
        update(*one, kept, factors, False)
        fused(*other, kept, factors, False)
        for expected, found in zip(one, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert counters["stats"]["unique_graphs"] >= 1


@pytest.mark.filterwarnings("ignore")
def test_the_loss_in_cpp_is_the_loss_whatever_was_compiled_before() -> None:
    """torch keeps what it compiled on disk, and finds it again for the next run, whose weights are others."""
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(24, 50, generator=generator) for _ in range(2))
    target_N = torch.randint(50, (24,), generator=generator)
    for weight, temperature in ((1.0, 1.0), (0.67, 1.0), (0.67, 2.0), (0.3, 4.0)):
        torch._dynamo.reset()
        running = session(AdaptiveSparse(), distill_weight=weight, distill_temperature=temperature)
        compile_session(running, [], 4)
        assert running.objective.losses is not None
        words = (target_N, weight, temperature)
        expected = slice_losses(student_NV.clone(), teacher_NV.clone(), *words)
        found = running.objective.losses(student_NV.clone(), teacher_NV.clone(), *words)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_torch_cannot_compile_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled, "BACKEND", refuses)
    plain, fused = session(AdaptiveSparse()), session(AdaptiveSparse())
    compile_session(fused, fused.model.model.layers, 4)
    assert fused.run_step(corpus(), 4).loss == pytest.approx(plain.run_step(corpus(), 4).loss, rel=1e-5)


class Block(nn.Module):
    """Of a kind of its own if its layer is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = self.layer(x_TI).relu()
        return y_TO


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_block_that_a_budget_makes_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    layers = [type(f"Linear{number}", (nn.Linear,), {})(4, 4) for number in range(12)]
    blocks = [Block(layer) for layer in layers]
    compile_session(session(AdaptiveSparse()), blocks, 4)
    for block in blocks:
        block(torch.ones(2, 4))
    assert counters["stats"]["unique_graphs"] == len(blocks)


@pytest.mark.filterwarnings("ignore")
def test_long_windows_keep_torch_s_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_SCORES", 4 * 4 * 16 * 16 - 1)
    wide = session(AdaptiveSparse())
    compile_session(wide, [], 4)
    assert wide.model.config._attn_implementation == "sdpa"


def test_only_long_runs_alone_on_a_cpu_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_cpp_compiler", lambda: True)
    assert pays(134_000_000, LONG, "cpu", 1)
    assert not pays(134_000_000, LONG, "cpu", 2) and not pays(134_000_000, LONG, "cuda:0", 1)
    assert not pays(1_000_000, LONG, "cpu", 1)
    with torch._dynamo.config.patch(disable=True):
        assert not pays(134_000_000, LONG, "cpu", 1)


def test_a_machine_without_a_compiler_compiles_nothing() -> None:
    search = torch._inductor.cpp_builder.cpp_compiler_search
    search.cache_clear()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not pays(134_000_000, LONG, "cpu", 1)
    search.cache_clear()
