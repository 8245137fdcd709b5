"""Reports: worst verdict wins, exit codes, JSON with the raw samples, Markdown for people."""

import itertools
import json
from pathlib import Path

import pytest

from sparse_serve.gate import page
from sparse_serve.gate.evidence import Limits
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.verdict import CheckResult, Verdict
from tests.sparse_serve.gate.test_checks import evidence


def report(*verdicts: Verdict) -> GateReport:
    results = [CheckResult(f"check{i}", verdict, "because", {"x": 1.0}) for i, verdict in enumerate(verdicts)]
    return GateReport(results, evidence(count=9), Limits(), {"pattern": "2:4"})


def test_exit_codes() -> None:
    assert {verdict.value: verdict.exit_code for verdict in Verdict} == {
        "pass": 0,
        "fail": 1,
        "error": 3,
        "inconclusive": 4,
    }


@pytest.mark.parametrize("pair", list(itertools.product(Verdict, repeat=2)))
def test_the_worst_verdict_wins(pair: tuple[Verdict, Verdict]) -> None:
    order = [Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL, Verdict.ERROR]
    assert report(*pair).verdict is order[max(map(order.index, pair))]


def test_json_holds_every_raw_sample() -> None:
    value = json.loads(report(Verdict.PASS, Verdict.FAIL).to_json())
    assert value["schema_version"] == 3
    assert value["verdict"] == "fail"
    assert [result["verdict"] for result in value["results"]] == ["pass", "fail"]
    (text,) = value["evidence"]["texts"]
    for target, stack in itertools.product(("base", "candidate"), ("offline", "served")):
        assert len(text[target][stack]["nll_per_window"]) == 9
    assert value["limits"]["max_ppl_increase"] == Limits().max_ppl_increase


def test_a_report_that_cannot_be_made_leaves_none_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(Verdict.PASS).write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(page, "page", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(Verdict.PASS).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_markdown_says_verdict_checks_and_protocol() -> None:
    text = report(Verdict.INCONCLUSIVE).to_markdown()
    assert text.startswith("# Gate: INCONCLUSIVE\n")
    assert "| check0 | inconclusive | because |" in text
    assert "9 windows, 63 scored tokens" in text
    assert "- pattern: `2:4`" in text
