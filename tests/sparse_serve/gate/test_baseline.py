"""Reports of different days: what was measured alike is judged, and what was not is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.errors import FormatError
from sparse_serve.cli.main import main
from sparse_serve.gate import baseline, report_file, served
from sparse_serve.gate.evidence import Evidence, SpeedEvidence
from sparse_serve.gate.verdict import Verdict
from tests.sparse_serve.gate.servers import of_vllm, server
from tests.sparse_serve.gate.test_checks import evidence, rounds
from tests.sparse_serve.gate.test_reports import ENVIRONMENT, whole, written
from tests.sparse_serve.gate.test_served import TEXT, config


def test_two_reports_are_compared_and_another_environment_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = written(tmp_path / "a", whole(evidence(noise=0)))
    same = written(tmp_path / "b", whole(evidence(noise=0)))
    worse = written(tmp_path / "c", whole(evidence(shift=0.3)))
    elsewhere = written(tmp_path / "d", whole(evidence(noise=0), {**ENVIRONMENT, "processor": "B"}))
    out = tmp_path / "out"

    def compare(later: Path) -> int:
        return main(["gate", "compare", str(earlier), str(later), "--out", str(out)])

    assert compare(same) == 0
    assert compare(worse) == 1
    assert compare(elsewhere) == 4
    assert "the two were not measured alike: processor 'A CPU', then 'B'" in capsys.readouterr().out
    report_file.load(out / "report.json")


def test_reports_without_a_text_in_common_are_not_compared(tmp_path: Path) -> None:
    one = report_file.load(written(tmp_path, whole()))
    other = {**one, "evidence": {**one["evidence"], "texts": [], "tasks": [], "speed": None}}
    with pytest.raises(FormatError, match="nothing in common"):
        baseline.compare(one, other)


def stored(tmp_path: Path, speed: SpeedEvidence, **provenance: str) -> dict[str, Any]:
    """A report of speed alone."""
    report = whole(Evidence(speed=speed))
    named = replace(report, provenance={**report.provenance, **provenance})
    return report_file.load(written(tmp_path / str(len(list(tmp_path.iterdir()))), named))


def on_a_slower_host(speed: SpeedEvidence, factor: float, shows: bool = True) -> SpeedEvidence:
    """Everything takes longer; `shows`: also the fixed computation."""

    def slower(round: Any) -> Any:
        runs = [
            replace(
                run,
                ttft_ms=[factor * value for value in run.ttft_ms],
                duration_s=factor * run.duration_s,
            )
            for run in round.runs
        ]
        probes = tuple((factor if shows else 1) * probe for probe in round.host.probe_s)
        return replace(round, runs=runs, host=replace(round.host, probe_s=probes))

    return replace(speed, rounds=[slower(round) for round in speed.rounds])


def verdicts(earlier: dict[str, Any], later: dict[str, Any]) -> set[Verdict]:
    return {result.verdict for result in baseline.compare(earlier, later).results if result.check == "speed"}


def test_with_the_same_base_a_slower_day_is_no_regression(tmp_path: Path) -> None:
    base = {"base_digest": "sha256:1"}
    earlier = stored(tmp_path, rounds(seed=1), **base)
    same = stored(tmp_path, on_a_slower_host(rounds(seed=2), 1.3), **base)
    slower = stored(tmp_path, rounds(slowdown=0.2, seed=2), **base)
    assert verdicts(earlier, same) == {Verdict.PASS}
    assert verdicts(earlier, slower) == {Verdict.FAIL}
    (result, _) = [one for one in baseline.compare(earlier, slower).results if one.check == "speed"]
    assert result.numbers["slowdown"] == pytest.approx(0.2, abs=0.01)
    assert "as ratios to the base of both" in result.summary


def test_without_a_base_in_common_times_count_where_the_host_is_as_fast(tmp_path: Path) -> None:
    earlier = stored(tmp_path, rounds(seed=1))
    again = stored(tmp_path, rounds(seed=2))
    slow_host = stored(tmp_path, on_a_slower_host(rounds(seed=2), 1.3))
    slower = stored(tmp_path, on_a_slower_host(rounds(seed=2), 1.3, shows=False))
    other_base = stored(tmp_path, rounds(seed=2), base_digest="sha256:2")
    assert verdicts(earlier, again) == verdicts(earlier, other_base) == {Verdict.PASS}
    assert verdicts(earlier, slow_host) == {Verdict.INCONCLUSIVE}
    assert verdicts(earlier, slower) == {Verdict.FAIL}
    unwatched = replace(rounds(), rounds=[replace(round, host=None) for round in rounds().rounds])
    from_files = stored(tmp_path, unwatched)
    assert verdicts(earlier, from_files) == {Verdict.INCONCLUSIVE}
    assert "nobody watched the host" in baseline.compare(from_files, earlier).results[-1].summary


def test_speed_of_another_environment_or_with_few_rounds_is_not_judged(tmp_path: Path) -> None:
    earlier = stored(tmp_path, rounds(seed=1))
    elsewhere = stored(tmp_path, rounds(slowdown=0.5, seed=2))
    elsewhere["environment"] = {**ENVIRONMENT, "cores": "64"}
    assert verdicts(earlier, elsewhere) == {Verdict.INCONCLUSIVE}
    assert "cores None, then '64'" in baseline.compare(earlier, elsewhere).results[0].summary
    few = stored(tmp_path, rounds(count=3))
    assert verdicts(earlier, few) == {Verdict.INCONCLUSIVE}


def test_other_loads_and_other_samples_are_not_compared(tmp_path: Path) -> None:
    earlier = stored(tmp_path, rounds(seed=1))
    longer = stored(tmp_path, replace(rounds(seed=1), output_tokens=128))
    with pytest.raises(FormatError, match="nothing in common"):
        baseline.compare(earlier, longer)
    one = report_file.load(written(tmp_path / "one", whole()))
    other = report_file.load(written(tmp_path / "other", whole()))
    assert "tasks" in {result.check for result in baseline.compare(one, other).results}
    other["evidence"]["tasks"][0]["samples_digest"] = "sha256:3"
    assert "tasks" not in {result.check for result in baseline.compare(one, other).results}


def test_a_failed_request_is_an_error_in_a_disturbed_round_too(tmp_path: Path) -> None:
    found = rounds(seed=2)
    broken = replace(
        found.rounds[0],
        host=replace(found.rounds[0].host, foreign=0.9),
        runs=[replace(found.rounds[0].runs[0], failed=1), *found.rounds[0].runs[1:]],
    )
    later = stored(tmp_path, replace(found, rounds=[broken, *found.rounds[1:]]))
    assert verdicts(stored(tmp_path, rounds(seed=1)), later) == {Verdict.ERROR}


def test_what_only_one_report_has_is_said_and_is_no_pass(tmp_path: Path) -> None:
    whole_one = report_file.load(written(tmp_path, whole()))
    assert baseline.compare(whole_one, whole_one).verdict is Verdict.PASS
    fewer = {**whole_one, "evidence": {**whole_one["evidence"], "tasks": []}}
    no_speed = {**whole_one, "evidence": {**whole_one["evidence"], "speed": None}}
    for earlier, later, said in (
        (whole_one, fewer, "not in the later report: words with these 1000 samples"),
        (fewer, whole_one, "not in the earlier report: words with these 1000 samples"),
        (whole_one, no_speed, "not in the later report: throughput under clients: 1, "),
    ):
        report = baseline.compare(earlier, later)
        (coverage,) = [result for result in report.results if result.check == "coverage"]
        assert report.verdict is coverage.verdict is Verdict.INCONCLUSIVE
        assert coverage.summary.startswith(said)


def test_a_wrong_kernel_of_the_later_report_fails_a_comparison(tmp_path: Path) -> None:
    good = evidence()
    kernels = [replace(one, error=1.0) for one in good.kernels["candidate"]]
    earlier = report_file.load(written(tmp_path / "a", whole(good)))
    later = report_file.load(written(tmp_path / "b", whole(replace(good, kernels={"candidate": kernels}))))
    assert baseline.compare(earlier, later).verdict is Verdict.FAIL
    assert baseline.compare(later, earlier).verdict is Verdict.PASS, "the earlier one is what there was"


def test_a_recording_measures_one_target_and_is_compared_with_later_ones(tmp_path: Path) -> None:
    """The base is not asked at all; the candidate is asked each piece once."""
    asked: list[str] = []

    def noting(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(body["prompt"])
        return of_vllm()(body)

    def gate(verb: str, address: str, out: str) -> int:
        (tmp_path / "gate.yaml").write_text(
            config("http://127.0.0.1:1", address, tmp_path, max_ppl_increase=0.01).model_dump_json(exclude_none=True)
        )
        return main(["gate", verb, str(tmp_path / "gate.yaml"), "--out", str(tmp_path / out)])

    with server(noting) as before, server(of_vllm()) as same, server(of_vllm(0.2)) as worse:
        assert gate("record", before, "before") == 0
        assert sorted(asked) == sorted(served.pieces(TEXT, 150, None))
        assert gate("record", same, "same") == gate("record", worse, "worse") == 0

    def compare(later: str) -> int:
        reports = [str(tmp_path / name / "report.json") for name in ("before", later)]
        return main(["gate", "compare", *reports, "--out", str(tmp_path / "out")])

    assert (compare("same"), compare("worse")) == (0, 1)
    report = str(tmp_path / "same/report.json")
    assert main(["gate", "compare", report, report, "--out", str(tmp_path / "same")]) == 2, "it would be overwritten"
    assert Path(report).is_file()
