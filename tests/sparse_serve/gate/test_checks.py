"""The checks on evidence made up so that the right verdict is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from maskgen.core.divergence import Divergence
from maskgen.core.perplexity import Perplexity, Protocol
from sparse_serve.engine import EngineInfo
from sparse_serve.gate.checks import divergence, kernels, memory, parity, quality, tasks
from sparse_serve.gate.evidence import (
    Evidence,
    HostReading,
    Limits,
    MemoryReading,
    Scores,
    SpeedEvidence,
    SpeedRound,
    SpeedRun,
    TaskEvidence,
    TextEvidence,
)
from sparse_serve.gate.verdict import CheckResult, Verdict, worst
from sparse_serve.tuning.parity_file import KernelParity

PROTOCOL = Protocol(window_tokens=8)
NLL = np.random.default_rng(7).normal(4.0, 0.5, 200)
INFO = EngineInfo("m", 64, 99, "bfloat16", sparse_layers=4, sparse_weight_bytes=5625, dense_equivalent_bytes=10000)


def ppl(nll: np.ndarray) -> Perplexity:
    return Perplexity(PROTOCOL, [float(value) for value in nll], [7] * len(nll), "sha256:" + "0" * 64)


def evidence(
    shift: float = 0.0,
    noise: float = 0.01,
    served_error: float = 0.0,
    info: EngineInfo = INFO,
    count: int = 200,
    seed: int | None = None,
) -> Evidence:
    """One text, one task: the candidate is worse by `shift` nats, and by as many of its answers.

    By that exactly on the average over the windows; with a `seed`, by that and chance.
    """
    base, spread, other = NLL[:count], *np.random.default_rng(seed or 0).normal(0, 1, (2, count))
    candidate = base + shift + noise * (spread if seed is not None else spread - spread.mean())
    kl, agreement = 0.01 + shift + 0.001 * other, np.full(count, max(0.97 - shift, 0))
    text = TextEvidence(
        "a.txt",
        base=Scores(ppl(base), ppl(base)),
        candidate=Scores(ppl(candidate + served_error), ppl(candidate)),
        divergence=Divergence(list(kl), list(agreement), [7] * count),
    )
    answers = [True] * 800 + [False] * 200
    lost = round(800 * min(shift, 1.0))
    task = TaskEvidence("words", answers, [False] * lost + answers[lost:])
    return Evidence(
        [text],
        replace(info, sparse_layers=0),
        info,
        packed_fraction=0.5625,
        kernels={"candidate": kernel_parity()},
        memory={"base": MemoryReading(2, 3_000_000_000, weight_bytes=270_000_000)},
        speed=rounds(slowdown=min(shift, 0.5)),
        tasks=[task],
    )


def kernel_parity(layers: int = 4) -> list[KernelParity]:
    """Of a kernel that is right, in so many layers."""
    buckets = [(1, 1), (2, 4)]
    return [
        KernelParity(f"layer.{number}", "cpu", first, last, last, 0.001, 0.01)
        for number in range(layers)
        for first, last in buckets
    ]


def rounds(slowdown: float = 0.0, noise: float = 0.005, count: int = 16, seed: int = 3) -> SpeedEvidence:
    """Rounds whose metrics are ten per cent of a second and `noise`, times one and `slowdown` for the candidate."""
    rng = np.random.default_rng(seed)
    quiet = HostReading(0.0, 0.0, (0.001,))

    def one(target: str) -> SpeedRun:
        factor = (1 + slowdown if target == "candidate" else 1.0) * math.exp(rng.normal(0, noise))
        return SpeedRun(target, [100 * factor] * 4, [20 * factor] * 40, [300 * factor] * 4, factor, 44)

    order = ("base", "candidate", "candidate", "base")
    return SpeedEvidence(
        [SpeedRound(number, 1, [one(target) for target in order], quiet) for number in range(count)],
        ("ttft_p50", "throughput"),
    )


LIMITS = Limits(max_kl=0.1, max_flips=0.1)


def only(results: list[CheckResult]) -> CheckResult:
    (result,) = results
    return result


def test_quality_passes_when_the_upper_bound_is_within_the_limit() -> None:
    result = only(quality.run(evidence(shift=0.02), Limits(max_ppl_increase=0.05)))
    assert result.verdict is Verdict.PASS
    assert result.numbers["ppl_increase"] == pytest.approx(math.expm1(0.02), abs=0.003)
    assert result.numbers["lower_bound"] < result.numbers["ppl_increase"] < result.numbers["upper_bound"]


def test_quality_fails_when_the_lower_bound_is_beyond_the_limit() -> None:
    assert only(quality.run(evidence(shift=0.08), Limits(max_ppl_increase=0.05))).verdict is Verdict.FAIL


def test_quality_is_inconclusive_when_the_bounds_straddle_the_limit() -> None:
    result = only(quality.run(evidence(shift=math.log1p(0.05), noise=0.2), Limits(max_ppl_increase=0.05)))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.numbers["lower_bound"] < 0.05 < result.numbers["upper_bound"]


def test_quality_needs_enough_windows() -> None:
    assert only(quality.run(evidence(count=7), Limits())).verdict is Verdict.INCONCLUSIVE


def test_quality_of_equal_models_passes_and_of_an_exact_shift_is_exact() -> None:
    assert only(quality.run(evidence(noise=0.0), Limits(max_ppl_increase=0.0))).verdict is Verdict.PASS
    result = only(quality.run(evidence(shift=0.5, noise=0.0), Limits()))
    assert result.verdict is Verdict.FAIL


def test_pairing_sees_what_an_unpaired_comparison_cannot() -> None:
    """The windows spread by 0.5 nats, the effect is 0.02: only differences resolve it."""
    result = only(quality.run(evidence(shift=0.02, noise=0.01), Limits(max_ppl_increase=0.025)))
    assert result.verdict is Verdict.PASS
    unpaired_error = 2 * NLL.std() / math.sqrt(len(NLL))
    assert result.numbers["upper_bound"] - result.numbers["lower_bound"] < unpaired_error / 10


def test_quality_error_rate_is_about_alpha() -> None:
    """At exactly the limit, the chance of a false pass is alpha."""
    limit = Limits(max_ppl_increase=math.expm1(0.03), alpha=0.1)
    passes = sum(
        only(quality.run(evidence(shift=0.03, noise=0.05, count=40, seed=seed), limit)).verdict is Verdict.PASS
        for seed in range(60)
    )
    assert 0 < passes <= 15  # Binomial(60, 0.1) is outside with probability below 0.002


def test_parity_blames_the_side_that_differs() -> None:
    assert only(parity.run(evidence(served_error=0.0005), Limits(parity_tolerance=0.001))).verdict is Verdict.PASS
    result = only(parity.run(evidence(served_error=0.002), Limits(parity_tolerance=0.001)))
    assert result.verdict is Verdict.FAIL
    assert result.numbers["base_relative_difference"] == 0
    assert result.numbers["candidate_relative_difference"] == pytest.approx(0.002, rel=0.01)


@pytest.mark.parametrize(
    ("resident", "layers", "verdict"),
    [(5625, 4, Verdict.PASS), (6250, 4, Verdict.PASS), (10000, 4, Verdict.FAIL), (0, 0, Verdict.FAIL)],
)
def test_memory_judges_resident_bytes(resident: int, layers: int, verdict: Verdict) -> None:
    info = replace(INFO, sparse_layers=layers, sparse_weight_bytes=resident)
    assert only(memory.run(evidence(info=info), Limits())).verdict is verdict


def test_the_worst_text_decides() -> None:
    good, bad = evidence(shift=0.01), evidence(shift=0.3)
    both = replace(good, texts=[*good.texts, replace(bad.texts[0], text="b.txt")])
    results = quality.run(both, Limits())
    assert [(result.subject, result.verdict) for result in results] == [
        ("a.txt", Verdict.PASS),
        ("b.txt", Verdict.FAIL),
    ]
    assert worst(results) is Verdict.FAIL
    assert worst([]) is Verdict.ERROR, "nothing judged is no pass"


def test_samples_that_are_missing_or_no_numbers_are_errors() -> None:
    good = evidence().texts[0]
    served = good.candidate.served
    broken = [
        replace(served, nll_per_window=[math.nan, *served.nll_per_window[1:]]),
        replace(served, nll_per_window=served.nll_per_window[1:]),
        replace(served, nll_per_window=[]),
        replace(served, tokens_digest="sha256:" + "1" * 64),
    ]
    for scores in broken:
        changed = Evidence([replace(good, candidate=Scores(scores))])
        assert only(quality.run(changed, Limits())).verdict is Verdict.ERROR
    for kl in ([math.nan] * 200, [0.1] * 199):
        changed = Evidence([replace(good, divergence=replace(good.divergence, kl_per_window=kl))])
        assert {result.verdict for result in divergence.run(changed, LIMITS)} == {Verdict.ERROR}
    assert {result.verdict for result in divergence.run(Evidence([replace(good, divergence=None)]), LIMITS)} == {
        Verdict.ERROR
    }
    assert only(tasks.run(Evidence(tasks=[TaskEvidence("t", [True], [])]), Limits())).verdict is Verdict.ERROR


def test_divergence_is_judged_where_a_limit_is_given() -> None:
    assert divergence.run(evidence(), Limits()) == []
    assert [result.subject for result in divergence.run(evidence(), LIMITS)] == ["kl, a.txt", "flips, a.txt"]
    (result,) = divergence.run(evidence(shift=0.2), Limits(max_kl=0.1))
    assert result.verdict is Verdict.FAIL
    assert result.numbers["kl"] == pytest.approx(0.21, abs=0.001)


def test_a_target_that_was_not_measured_offline_has_no_parity() -> None:
    text = evidence().texts[0]
    assert (
        parity.run(Evidence([TextEvidence("a.txt", Scores(text.base.served), Scores(text.base.served))]), LIMITS) == []
    )


def test_kernels_that_are_right_pass() -> None:
    result = only(kernels.run(evidence(), Limits()))
    assert (result.verdict, result.subject) == (Verdict.PASS, "cpu, candidate")
    assert result.numbers["layers"] == 4
    assert "largest difference is 10 % of what rounding explains" in result.summary


def test_a_kernel_that_is_wrong_once_fails_and_is_named() -> None:
    wrong = KernelParity("layer.2", "cpu", 2, 4, 4, 0.5, 0.01, (16, 31), (128, 255))
    found = [*kernel_parity(), wrong, KernelParity("layer.3", "reference", 5, 16, 5, 0.0, 0.01)]
    results = kernels.run(replace(evidence(), kernels={"candidate": found}), Limits())
    assert [(result.subject, result.verdict) for result in results] == [
        ("cpu, candidate", Verdict.FAIL),
        ("reference, candidate", Verdict.PASS),
    ]
    assert "1 of 4 layers are wrong, worst layer.2 with 2 to 4 tokens at outputs 16 to 31, inputs 128 to 255" in (
        results[0].summary
    )
    broken = replace(wrong, error=math.inf, columns=None)
    result = only(kernels.run(replace(evidence(), kernels={"candidate": [*kernel_parity(), broken]}), Limits()))
    assert result.verdict is Verdict.FAIL and "at outputs 16 to 31: off by inf" in result.summary


def test_layers_that_were_not_compared_are_an_error() -> None:
    for layers in (0, 3):
        results = kernels.run(replace(evidence(), kernels={"candidate": kernel_parity(layers)}), Limits())
        assert worst(results) is Verdict.ERROR
        assert results[0].summary == f"{layers} layers were compared; expected at least 4"
    assert kernels.run(replace(evidence(), kernels={}), Limits()) == [], "nothing sparse was served"


def test_every_rank_of_a_layer_is_compared_and_named() -> None:
    both = [replace(one, rank=rank, ranks=2) for one in kernel_parity() for rank in (0, 1)]
    assert only(kernels.run(replace(evidence(), kernels={"candidate": both}), Limits())).verdict is Verdict.PASS
    missing = [one for one in both if (one.layer, one.rank) != ("layer.3", 1)]
    results = kernels.run(replace(evidence(), kernels={"candidate": missing}), Limits())
    assert worst(results) is Verdict.ERROR
    assert results[0].summary == "layer.3 was not compared on rank 1"
    wrong = replace(both[-1], error=0.5, rows=(0, 15))
    result = only(kernels.run(replace(evidence(), kernels={"candidate": [*both[:-1], wrong]}), Limits()))
    assert "1 of 4 layers are wrong, worst layer.3 (rank 1 of 2) with 2 to 4 tokens" in result.summary
