"""How often the gate is wrong, over simulated runs in which the truth is known."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sparse_serve.gate.checks import quality, speed, tasks
from sparse_serve.gate.evidence import Evidence, Limits, Scores, SpeedEvidence, TaskEvidence, TextEvidence
from sparse_serve.gate.verdict import Verdict, worst
from tests.sparse_serve.gate.test_checks import ppl, rounds

RUNS = 200
SPEED_RUNS = 100
"""Each of them is looked at up to five times, with a bootstrap each."""


def verdicts(run: Callable[[int], Verdict], runs: int = RUNS) -> Counter[Verdict]:
    return Counter(run(seed) for seed in range(runs))


def quality_run(shift: float, limit: float, texts: int = 2) -> Callable[[int], Verdict]:
    """Texts of 100 windows; neighbours share part of what is easy and what is hard for the candidate."""

    def run(seed: int) -> Verdict:
        rng = np.random.default_rng(seed)
        made = []
        for number in range(texts):
            base = rng.normal(3.5, 0.5, 100)
            noise = np.convolve(rng.normal(0, 0.015, 101), [0.8, 0.6], "valid")
            made.append(TextEvidence(str(number), Scores(ppl(base)), Scores(ppl(base + shift + noise))))
        return worst(quality.run(Evidence(made), Limits(max_ppl_increase=limit)))

    return run


def dropped(lost: float, won: float, seed: int) -> TaskEvidence:
    """1,000 samples, of which a base answers 60 % correctly, and a candidate these shares fewer and more."""
    rng = np.random.default_rng(seed)
    base, chance = rng.random(1000) < 0.6, rng.random(1000)
    candidate = np.where(base, chance >= lost / 0.6, chance < won / 0.4)
    return TaskEvidence("t", base.tolist(), candidate.tolist())


def task_run(lost: float, won: float) -> Callable[[int], Verdict]:
    return lambda seed: worst(tasks.run(Evidence(tasks=[dropped(lost, won, seed)]), Limits()))


def speed_run(slowdown: float, noise: float, most: int = 64, **limits: float) -> Callable[[int], Verdict]:
    """As the runner does it: a look after so many rounds, until decided or the time is up."""

    def run(seed: int) -> Verdict:
        all_rounds = rounds(slowdown, noise, most, seed)
        verdict = Verdict.INCONCLUSIVE
        for look in (look for look in speed.LOOKS if look <= most):
            seen = SpeedEvidence(all_rounds.rounds[:look], ["ttft_p50"])
            verdict = worst(speed.run(Evidence(speed=seen), Limits(**limits)))
            if verdict is not Verdict.INCONCLUSIVE:
                return verdict
        return verdict

    return run


def test_identical_models_do_not_fail() -> None:
    for limit in (0.01, 0.05):
        counts = verdicts(quality_run(0.0, limit))
        assert counts[Verdict.FAIL] < 0.02 * RUNS
        assert counts[Verdict.PASS] > 0.9 * RUNS


def test_two_per_cent_of_perplexity_is_caught_at_a_limit_of_one() -> None:
    counts = verdicts(quality_run(math.log1p(0.02), 0.01))
    assert counts[Verdict.FAIL] >= 0.95 * RUNS
    assert counts[Verdict.PASS] == 0


def test_at_the_limit_each_error_is_about_as_rare_as_alpha_says() -> None:
    counts = verdicts(quality_run(math.log1p(0.01), 0.01, texts=1))
    assert 0 < counts[Verdict.PASS] <= 0.1 * RUNS
    assert 0 < counts[Verdict.FAIL] <= 0.1 * RUNS


def test_one_bad_text_among_good_ones_is_caught() -> None:
    def run(seed: int) -> Verdict:
        good, bad = quality_run(0.0, 0.01), quality_run(math.log1p(0.02), 0.01, texts=1)
        return max((good(seed), bad(seed + RUNS)), key=list(Verdict).index)

    assert verdicts(run)[Verdict.FAIL] >= 0.95 * RUNS


@pytest.mark.parametrize(("lost", "won"), [(0.04, 0.01), (0.05, 0.02), (0.06, 0.03)])
def test_a_task_that_drops_by_three_points_is_caught(lost: float, won: float) -> None:
    counts = verdicts(task_run(lost, won))
    assert counts[Verdict.FAIL] >= 0.9 * RUNS
    assert counts[Verdict.PASS] <= 0.01 * RUNS


def test_a_task_that_drops_is_caught_beside_tasks_that_stay() -> None:
    same = TaskEvidence("same", [True] * 900 + [False] * 100, [True] * 900 + [False] * 100)

    def run(seed: int) -> Verdict:
        return worst(tasks.run(Evidence(tasks=[same, dropped(0.06, 0.03, seed), same]), Limits()))

    assert verdicts(run)[Verdict.FAIL] >= 0.9 * RUNS


def test_identical_models_do_not_fail_a_task() -> None:
    """Scores of the same model differ by rounding, which turns a sample in some hundreds."""
    for share in (0.0, 0.003):
        counts = verdicts(task_run(share, share))
        assert counts[Verdict.FAIL] < 0.02 * RUNS
        assert counts[Verdict.PASS] > 0.9 * RUNS


def test_a_task_that_only_changes_its_mistakes_fails_no_more_often_than_alpha() -> None:
    for share in (0.005, 0.02):
        assert verdicts(task_run(share, share))[Verdict.FAIL] <= (0.05 + 0.03) * RUNS  # two standard errors
    assert verdicts(task_run(lost=0.005, won=0.005))[Verdict.PASS] > 0.5 * RUNS


@pytest.mark.parametrize("limit", [0.03, 0.05])
def test_five_per_cent_on_a_noisy_host_never_passes(limit: float) -> None:
    assert verdicts(speed_run(0.05, 0.15, max_slowdown=limit), SPEED_RUNS)[Verdict.PASS] == 0


def test_five_per_cent_on_a_quiet_host_is_caught() -> None:
    assert verdicts(speed_run(0.05, 0.02, max_slowdown=0.03), SPEED_RUNS)[Verdict.FAIL] >= 0.9 * SPEED_RUNS


def test_identical_servers_do_not_fail_and_pass_on_a_quiet_host() -> None:
    assert verdicts(speed_run(0.0, 0.15), SPEED_RUNS)[Verdict.FAIL] < 0.015 * SPEED_RUNS
    quiet = verdicts(speed_run(0.0, 0.02), SPEED_RUNS)
    assert quiet[Verdict.FAIL] == 0
    assert quiet[Verdict.PASS] >= 0.9 * SPEED_RUNS


def test_a_disturbed_host_is_inconclusive_whatever_the_numbers_say() -> None:
    slow = rounds(slowdown=0.5)
    assert {result.verdict for result in speed.run(Evidence(speed=slow), Limits())} == {Verdict.FAIL}
    signs = [{"steal": 0.1}, {"foreign": 0.5}]
    for change in signs:
        disturbed = [replace(round, host=replace(round.host, **change)) for round in slow.rounds]
        results = speed.run(Evidence(speed=replace(slow, rounds=disturbed)), Limits())
        assert {result.verdict for result in results} == {Verdict.INCONCLUSIVE}
        assert all("the host was disturbed in 16 of 16 rounds" in result.summary for result in results)


def test_a_few_disturbed_rounds_are_left_out() -> None:
    calm = rounds()
    odd = [
        replace(round, host=replace(round.host, probe_s=(0.002,)), runs=rounds(9.0).rounds[0].runs)
        if round.number in (3, 7)
        else round
        for round in calm.rounds
    ]
    results = speed.run(Evidence(speed=replace(calm, rounds=odd)), Limits())
    assert {result.verdict for result in results} == {Verdict.PASS}
    assert {result.numbers["clean_rounds"] for result in results} == {14.0}


def test_a_slowdown_below_the_floor_is_no_regression() -> None:
    """Half of 100 ms is more than a floor of 1 ms, and less than one of 60 ms."""
    slow = replace(rounds(slowdown=0.5), metrics=["ttft_p50"])
    assert worst(speed.run(Evidence(speed=slow), Limits(floor_ms=1.0))) is Verdict.FAIL
    assert worst(speed.run(Evidence(speed=slow), Limits(floor_ms=60.0))) is Verdict.PASS


def test_goodput_counts_requests_within_the_slo() -> None:
    """A time of 100 ms to the first token and 300 ms to the last, times 1.5 for the candidate."""
    slow = replace(rounds(slowdown=0.5, noise=0.0), metrics=["goodput"])
    by_slo = {(120.0, None): Verdict.FAIL, (None, 400.0): Verdict.FAIL, (50.0, 100.0): Verdict.FAIL}
    for (ttft, e2e), verdict in by_slo.items():
        (result,) = speed.run(Evidence(speed=replace(slow, slo_ttft_ms=ttft, slo_e2e_ms=e2e)), Limits())
        assert result.verdict is verdict
        assert result.numbers["base"] == pytest.approx(0.5 if (ttft, e2e) == (50.0, 100.0) else 4.5)
    same = replace(rounds(), metrics=["goodput"], slo_ttft_ms=1000.0)
    assert worst(speed.run(Evidence(speed=same), Limits())) is Verdict.PASS


@pytest.mark.parametrize(
    "change", [{"failed": 1}, {"ttft_ms": []}, {"ttft_ms": [math.nan]}, {"ttft_ms": [0.0]}, {"target": "base"}]
)
def test_runs_that_cannot_be_compared_are_errors(change: dict) -> None:
    measured = replace(rounds(), metrics=["ttft_p50"])
    first = measured.rounds[0]
    broken = replace(first, runs=[first.runs[0], replace(first.runs[1], **change), *first.runs[2:]])
    results = speed.run(Evidence(speed=replace(measured, rounds=[broken, *measured.rounds[1:]])), Limits())
    assert worst(results) is Verdict.ERROR
    assert speed.run(Evidence(speed=replace(measured, rounds=[])), Limits())[0].verdict is Verdict.ERROR
