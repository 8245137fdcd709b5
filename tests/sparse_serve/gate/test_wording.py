"""How numbers are said: gains as gains, losses as losses, with units, in every form of a report."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve.gate import baseline, explain, report_file, terms, wording
from sparse_serve.gate.checks import quality, speed, tasks
from sparse_serve.gate.config import GateConfig
from sparse_serve.gate.evidence import Evidence, HostReading, Limits, TaskEvidence
from sparse_serve.gate.host import contamination
from sparse_serve.gate.page import page
from sparse_serve.gate.verdict import CheckResult, Verdict
from tests.sparse_serve.gate.test_checks import evidence, rounds
from tests.sparse_serve.gate.test_reports import whole, written

RELATIVE = sorted(name for name, one in wording.QUANTITIES.items() if one.more)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("slowdown", -0.18, "18.0 % shorter"),
        ("slowdown", 0.18, "18.0 % longer"),
        ("slowdown", 0.0, "unchanged"),
        ("slowdown", -0.0001, "unchanged"),
        ("ppl_increase", -0.0125, "1.25 % lower"),
        ("drop", -0.025, "2.50 points better"),
        ("drop", 0.1, "10.00 points worse"),
        ("kl", 0.0, "0.0000 nats per token"),
        ("flips", 0.06, "6.00 % of positions"),
    ],
)
def test_an_estimate_has_a_unit_and_a_direction(name: str, value: float, text: str) -> None:
    assert wording.said(name, value) == text


@pytest.mark.parametrize(
    ("name", "low", "high", "text"),
    [
        ("slowdown", -0.2, -0.16, "between 20.0 % and 16.0 % shorter"),
        ("slowdown", -0.02, 0.004, "between 2.0 % shorter and 0.4 % longer"),
        ("slowdown", 0.0, 0.004, "between unchanged and 0.4 % longer"),
        ("kl", 0.01, 0.02, "between 0.0100 and 0.0200"),
    ],
)
def test_bounds_that_point_the_same_way_say_so_once(name: str, low: float, high: float, text: str) -> None:
    assert wording.between(name, low, high) == text


def test_a_limit_below_zero_asks_for_a_gain() -> None:
    assert wording.allowed("ppl_increase", 0.05) == "allowed 5.00 % higher"
    assert wording.allowed("ppl_increase", 0.0) == "allowed 0.00 % higher"
    assert wording.allowed("ppl_increase", -0.05) == "required 5.00 % lower"


@given(st.sampled_from(RELATIVE), st.floats(-0.99, 10))
def test_no_sign_is_said_and_the_other_way_is_the_other_word(name: str, value: float) -> None:
    said, opposite, one = wording.said(name, value), wording.said(name, -value), wording.QUANTITIES[name]
    assert "-" not in said and "+" not in said
    if said == "unchanged":
        assert opposite == said
    else:
        assert said.endswith(one.more if value > 0 else one.less)
        assert opposite == said.replace(*((one.more, one.less) if value > 0 else (one.less, one.more)))


def test_a_gain_is_said_as_a_gain_in_every_form(tmp_path: Path) -> None:
    """What took 82 % of the time is shorter, in a table, a page, an explanation and a comparison."""
    gain = whole(replace(evidence(), speed=rounds(slowdown=-0.18)))
    stored = report_file.load(written(tmp_path, gain))
    earlier = report_file.load(written(tmp_path / "earlier", whole(evidence())))
    later = baseline.compare(earlier, stored)
    assert gain.verdict is Verdict.PASS
    forms = [gain.to_markdown(), page(gain), "\n".join(explain.explain(stored)), later.to_markdown(), page(later)]
    for form in forms:
        assert re.search(r"1[78]\.\d % shorter, between 1\d\.\d % and 1\d\.\d % shorter", form)
        assert not re.search(r"[-+−]\d+(\.\d+)? ?%", form), "a share with a sign leaves its direction to be guessed"


def test_a_rate_is_said_by_the_time_that_the_same_work_takes() -> None:
    """A slowdown of a rate is base by candidate; its limit is one of time, too."""
    *_, result = speed.run(Evidence(speed=rounds(slowdown=0.25, noise=0.0)), Limits())
    assert "35.2 tokens/s, base 44 tokens/s: time for the same work 25.0 % longer" in result.summary


def test_perplexities_and_accuracies_are_said_with_what_they_became() -> None:
    (better,) = quality.run(evidence(shift=-0.1, noise=0.0), Limits())
    assert better.verdict is Verdict.PASS
    assert "9.52 % lower, between 9.52 % and 9.52 % lower" in better.summary
    (task,) = tasks.run(Evidence(tasks=[TaskEvidence("t", [False] * 50 + [True] * 50, [True] * 100)]), Limits())
    assert "0 lost and 50 won" in task.summary and ": 50.00 points better, at worst 4" in task.summary


def test_a_slower_probe_is_not_said_to_take_more_than_itself() -> None:
    quiet = [HostReading(0, 0, (1.0,))] * 4
    assert contamination([*quiet, HostReading(0, 0, (1.5,))])[-1] == (
        "the time of a fixed computation was 50.0 % longer than usual"
    )


@pytest.mark.parametrize(
    ("check", "subject", "title"),
    [
        ("speed", "ttft_p50, 1 client", "Speed: time to the first token, median (ttft_p50), 1 client"),
        (
            "speed",
            "e2e_p95, 4 clients",
            "Speed: time to the whole answer, 95 % of cases take no longer (e2e_p95), 4 clients",
        ),
        ("speed", "goodput, 1 client", "Speed: answers in time per second (goodput), 1 client"),
        ("divergence", "flips, a, b.txt", "Predictions: other first choices on a, b.txt"),
        ("quality", "a.txt", "Quality: perplexity on a.txt"),
        ("memory", "", "Memory of the sparse layers"),
        ("measurement", "", "Measurement"),
        ("speed", "odd", "Speed: odd"),
    ],
)
def test_a_result_has_a_title_without_abbreviations(check: str, subject: str, title: str) -> None:
    assert terms.title(CheckResult(check, Verdict.PASS, "", {}, subject)) == title


def test_the_page_begins_with_the_cause_and_ends_with_the_words_it_uses() -> None:
    bad = page(whole(evidence(shift=0.2)))
    above, below = bad.split("<h2>Results</h2>")
    assert "FAIL" in above and "Because of:" in above and "22.14 % higher" in above
    good = page(whole())
    assert "Because of:" not in good
    for word in ("perplexity", "KL divergence", "kernel", "round", "McNemar&#39;s p", "nats"):
        assert f"<dt>{word}</dt>" in below
    alone = page(replace(whole(), results=whole().results[-1:]))
    assert "<dt>perplexity</dt>" not in alone, "it explains what it uses"


def test_every_key_that_advice_names_is_one_of_gate_yaml() -> None:
    keys = set()
    for section in ("quality", "speed", "tasks"):
        (model,) = [
            one
            for one in GateConfig.model_fields[section].annotation.__args__  # type: ignore[union-attr]
            if one is not type(None)
        ]
        keys |= set(model.model_fields)
    named = {key for advice in explain.NEXT.values() for key in re.findall(r"\b(?:max|budget)_[a-z_]+", advice)}
    assert named and named <= keys
