"""The checks on evidence made up so that the right verdict is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from maskgen.core.perplexity import Perplexity, Protocol
from sparse_serve.engine import EngineInfo
from sparse_serve.gate.checks import memory, parity, quality
from sparse_serve.gate.report import Evidence, Limits, Measured, Verdict

PROTOCOL = Protocol(window_tokens=8)
RNG = np.random.default_rng(7)
NLL = RNG.normal(4.0, 0.5, 200)
INFO = EngineInfo("m", 64, 99, "bfloat16", sparse_layers=4, sparse_weight_bytes=5625, dense_equivalent_bytes=10000)


def ppl(nll: np.ndarray) -> Perplexity:
    return Perplexity(PROTOCOL, [float(value) for value in nll], [7] * len(nll), "sha256:" + "0" * 64)


def evidence(
    shift: float = 0.0, noise: float = 0.01, served_error: float = 0.0, info: EngineInfo = INFO, count: int = 200
) -> Evidence:
    dense = NLL[:count]
    sparse = dense + shift + RNG.normal(0, noise, count)
    return Evidence(
        dense=Measured(ppl(dense), ppl(dense), replace(info, sparse_layers=0)),
        sparse=Measured(ppl(sparse), ppl(sparse + served_error), info),
        packed_fraction=0.5625,
    )


def test_quality_passes_when_the_upper_bound_is_within_the_limit() -> None:
    result = quality.run(evidence(shift=0.02), Limits(max_ppl_increase=0.05))
    assert result.verdict is Verdict.PASS
    assert result.numbers["ppl_increase"] == pytest.approx(math.expm1(0.02), abs=0.003)
    assert result.numbers["lower_bound"] < result.numbers["ppl_increase"] < result.numbers["upper_bound"]


def test_quality_fails_when_the_lower_bound_is_beyond_the_limit() -> None:
    assert quality.run(evidence(shift=0.08), Limits(max_ppl_increase=0.05)).verdict is Verdict.FAIL


def test_quality_is_inconclusive_when_the_bounds_straddle_the_limit() -> None:
    result = quality.run(evidence(shift=math.log1p(0.05), noise=0.2), Limits(max_ppl_increase=0.05))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.numbers["lower_bound"] < 0.05 < result.numbers["upper_bound"]


def test_quality_needs_enough_windows() -> None:
    assert quality.run(evidence(count=7), Limits()).verdict is Verdict.INCONCLUSIVE


def test_quality_of_equal_models_passes_and_of_an_exact_shift_is_exact() -> None:
    assert quality.run(evidence(noise=0.0), Limits(max_ppl_increase=0.0)).verdict is Verdict.PASS
    result = quality.run(evidence(shift=0.5, noise=0.0), Limits())
    assert result.verdict is Verdict.FAIL


def test_pairing_sees_what_an_unpaired_comparison_cannot() -> None:
    """The windows spread by 0.5 nats, the effect is 0.02: only differences resolve it."""
    result = quality.run(evidence(shift=0.02, noise=0.01), Limits(max_ppl_increase=0.025))
    assert result.verdict is Verdict.PASS
    unpaired_error = 2 * NLL.std() / math.sqrt(len(NLL))
    assert result.numbers["upper_bound"] - result.numbers["lower_bound"] < unpaired_error / 10


def test_quality_error_rate_is_about_alpha() -> None:
    """At exactly the limit, the chance of a false pass is alpha."""
    limit = Limits(max_ppl_increase=math.expm1(0.03), alpha=0.1)
    passes = sum(
        quality.run(evidence(shift=0.03, noise=0.05, count=40), limit).verdict is Verdict.PASS for _ in range(60)
    )
    assert 0 < passes <= 15  # Binomial(60, 0.1) is outside with probability below 0.002


def test_parity_blames_the_side_that_differs() -> None:
    assert parity.run(evidence(served_error=0.0005), Limits(parity_tolerance=0.001)).verdict is Verdict.PASS
    result = parity.run(evidence(served_error=0.002), Limits(parity_tolerance=0.001))
    assert result.verdict is Verdict.FAIL
    assert result.numbers["dense_relative_difference"] == 0
    assert result.numbers["sparse_relative_difference"] == pytest.approx(0.002, rel=0.01)


@pytest.mark.parametrize(
    ("resident", "layers", "verdict"),
    [(5625, 4, Verdict.PASS), (6250, 4, Verdict.PASS), (10000, 4, Verdict.FAIL), (0, 0, Verdict.FAIL)],
)
def test_memory_judges_resident_bytes(resident: int, layers: int, verdict: Verdict) -> None:
    info = replace(INFO, sparse_layers=layers, sparse_weight_bytes=resident)
    assert memory.run(evidence(info=info), Limits()).verdict is verdict
