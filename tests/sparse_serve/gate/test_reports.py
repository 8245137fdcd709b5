"""What else is made of a report: a page, JUnit XML, an explanation, a comparison with an earlier one."""

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from maskgen.core.errors import FormatError
from sparse_serve.cli.main import main
from sparse_serve.gate import explain, report_file
from sparse_serve.gate.evidence import Evidence
from sparse_serve.gate.junit import junit
from sparse_serve.gate.page import page
from sparse_serve.gate.report import GateReport
from sparse_serve.gate.runner import judge
from sparse_serve.gate.verdict import CheckResult, Verdict
from tests.sparse_serve.gate.test_checks import LIMITS, evidence

ENVIRONMENT = {"processor": "A CPU", "versions": "vllm 0.32"}


def whole(measured: Evidence | None = None, environment: dict[str, str] = ENVIRONMENT) -> GateReport:
    """A report with every kind of result."""
    measured = measured or evidence()
    provenance = {"base": "dense <1>", "candidate": "sparse", "created": "now", "base_matches": True}
    return GateReport(judge(measured, LIMITS), measured, LIMITS, provenance, environment)


def written(folder: Path, report: GateReport) -> Path:
    """The JSON of a report that is written whole into `folder`."""
    report.write(folder)
    return folder / "report.json"


def test_every_form_is_written_and_the_json_follows_its_schema(tmp_path: Path) -> None:
    report = whole()
    report.write(tmp_path)
    names = ["junit.xml", "report.html", "report.json", "report.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    jsonschema.Draft202012Validator.check_schema(report_file.schema())
    assert report_file.load(tmp_path / "report.json") == json.loads(report.to_json())


def test_numbers_that_are_none_are_null_in_a_valid_file(tmp_path: Path) -> None:
    good = evidence()
    served = good.texts[0].candidate.served
    broken = replace(served, nll_per_window=[math.nan, *served.nll_per_window[1:]])
    text = replace(good.texts[0], candidate=replace(good.texts[0].candidate, served=broken))
    report = whole(replace(good, texts=[text]))
    assert report.verdict is Verdict.ERROR
    stored = report_file.load(written(tmp_path, report))
    assert stored["evidence"]["texts"][0]["candidate"]["served"]["nll_per_window"][0] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema_version"),
        ({"verdict": "fine"}, "verdict"),
        ({"results": [{}]}, r"results\[0\]"),
        ({"more": 1}, "more"),
        ({"limits": {}}, "limits"),
        ({"limits": {**asdict(LIMITS), "alpha": 5.0}}, "limits.alpha"),
        ({"limits": {**asdict(LIMITS), "max_ppl_increase": None}}, "limits.max_ppl_increase"),
    ],
)
def test_a_file_that_is_no_report_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**json.loads(whole().to_json()), **change}))
    with pytest.raises(FormatError, match=f"is no report of this version: .*{message}"):
        report_file.load(path)
    assert main(["gate", "explain", str(path)]) == 2


@pytest.mark.parametrize("losses", [[], [1e308], [-50.0]])
def test_losses_that_no_model_has_are_refused(losses: list[float], tmp_path: Path) -> None:
    value = json.loads(whole().to_json())
    value["evidence"]["texts"][0]["candidate"]["served"]["nll_per_window"] = losses
    path = tmp_path / "report.json"
    path.write_text(json.dumps(value))
    with pytest.raises(FormatError, match="nll_per_window"):
        report_file.load(path)


def test_a_time_below_zero_is_refused(tmp_path: Path) -> None:
    value = json.loads(whole().to_json())
    value["evidence"]["speed"]["rounds"][0]["runs"][0]["ttft_ms"][0] = -5.0
    path = tmp_path / "report.json"
    path.write_text(json.dumps(value))
    with pytest.raises(FormatError, match=r"ttft_ms\[0\]"):
        report_file.load(path)


def test_a_verdict_that_its_results_do_not_give_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**json.loads(whole(evidence(shift=0.5)).to_json()), "verdict": "pass"}))
    with pytest.raises(FormatError, match="says pass, and its results fail; it was changed"):
        report_file.load(path)


def test_junit_has_a_case_for_each_result() -> None:
    verdicts = list(Verdict)
    results = [CheckResult("quality", verdict, f"a <&\x00> {verdict.value}", {}, verdict.value) for verdict in verdicts]
    suite = ElementTree.fromstring(junit(GateReport(results, Evidence(), LIMITS, {})))
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "1",
        "skipped": "1",
    }
    assert [(case.get("name"), case[0].tag) for case in suite] == [
        ("pass", "system-out"),
        ("inconclusive", "skipped"),
        ("fail", "failure"),
        ("error", "error"),
    ]
    assert suite[2][0].get("message") == "a <&?> fail"


class Page(HTMLParser):
    """Collects tags and what they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_has_everything_inside(tmp_path: Path) -> None:
    report = whole()
    text = page(report)
    found = Page(text)
    assert found.loaded == [] and "script" not in found.tags and "@import" not in text
    assert "dense &lt;1&gt;" in text and "dense <1>" not in text
    assert f"The verdict is the worst of the results below: {len(report.results)} pass." in text
    assert "the results below: 2 fail, " in page(whole(evidence(served_error=0.5)))
    assert found.tags.count("section") == len(report.results)
    bars = sum("limit" in result.numbers and "upper_bound" in result.numbers for result in report.results)
    assert found.tags.count("svg") == bars + 1 + 2, "bars, a text, two metrics"
    assert not re.search(r"\b(nan|inf)\b", text)
    for coordinate in re.findall(r'c[xy]="([^"]*)"', text):
        assert 0 <= float(coordinate) <= 640


def test_the_page_of_an_empty_or_broken_report_is_written() -> None:
    assert "Something could not be measured" in page(GateReport([], Evidence(), LIMITS, {}))
    assert "Results" in page(whole(evidence(shift=0.5, count=3)))


def test_explain_says_the_worst_first_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = written(tmp_path, whole(evidence(shift=0.5)))
    assert main(["gate", "explain", str(bad)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("FAIL: The candidate is worse than allowed")
    assert "what it is: How much worse the candidate predicts" in out
    assert "next: Keep more layers dense" in out
    lines = list(explain.explain(report_file.load(bad)))
    assert [line.split()[0] for line in lines if line[:1].isupper()][1:] == sorted(
        (line.split()[0] for line in lines if line[:1].isupper() and not line.endswith(".")), key=["FAIL", "PASS"].index
    )
