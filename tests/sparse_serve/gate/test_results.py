"""Files of other load generators: read as rounds, and refused in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from sparse_serve.cli.main import main
from sparse_serve.gate import GateConfig, Verdict, report_file, run
from sparse_serve.gate.plan import plan
from sparse_serve.gate.results import read_run
from sparse_serve.runtime.errors import SettingsError
from tests.directories import dense_dir

MS = 1_000_000


def aiperf(**changes: Any) -> dict[str, Any]:
    """A record of a request, as `aiperf profile --export-level records` writes it."""
    record = {
        "metadata": {
            "session_num": 0,
            "x_request_id": "a",
            "conversation_id": "b",
            "turn_index": 0,
            "request_start_ns": 1_000 * MS,
            "request_end_ns": 1_300 * MS,
            "worker_id": "worker_1",
            "record_processor_id": "record_processor_1",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
        },
        "metrics": {
            "input_sequence_length": {"value": 8, "unit": "tokens"},
            "output_sequence_length": {"value": 5, "unit": "tokens"},
            "request_latency": {"value": 0.3, "unit": "sec"},
            "time_to_first_token": {"value": 100.0, "unit": "ms"},
            "inter_token_latency": {"value": 50.0, "unit": "ms"},
            "output_token_throughput_per_user": {"value": 20.0, "unit": "tokens/sec/user"},
            "usage_completion_tokens_diff_pct": {"value": -1.5, "unit": "%"},
        },
        "error": None,
    }
    return {**record, **changes}


def guidellm(*successful: dict[str, Any], **more: list[Any]) -> dict[str, Any]:
    """A report of GuideLLM with one benchmark."""
    requests = {"successful": list(successful), "incomplete": [], "errored": [], "total": None, **more}
    benchmark = {"type_": "generative_benchmark", "config": {"strategy": {"type_": "concurrent"}}, "requests": requests}
    return {"metadata": {"version": 1}, "config": {}, "benchmarks": [benchmark]}


def request(factor: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {
        "request_id": "a",
        "request_start_time": 10.0,
        "request_end_time": 10.0 + 0.3 * factor,
        "request_latency": 0.3 * factor,
        "time_to_first_token_ms": 100.0 * factor,
        "inter_token_latency_ms": 50.0 * factor,
        "output_tokens": 5,
        **changes,
    }


def vllm(**changes: Any) -> dict[str, Any]:
    """What the gate reads of a report of `vllm bench serve`."""
    return {
        "model_id": "m",
        "num_prompts": 2,
        "completed": 2,
        "duration": 0.3,
        "total_output_tokens": 10,
        "ttfts": [0.1, 0.1],
        "itls": [[0.05] * 4, [0.05] * 4],
        **changes,
    }


def written(path: Path, content: Any) -> Path:
    if isinstance(content, list):
        content = "".join(f"{json.dumps(line)}\n" for line in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "content", "gaps"),
    [
        ("profile_export.jsonl", [aiperf(), aiperf()], 2),
        ("benchmarks.json", guidellm(request(), request()), 2),
        ("result.json", vllm(), 8),
    ],
)
def test_each_form_is_read_in_milliseconds(name: str, content: Any, gaps: int, tmp_path: Path) -> None:
    found = read_run(written(tmp_path / name, content), "candidate")
    assert found.target == "candidate" and found.failed == 0
    assert found.ttft_ms == pytest.approx([100.0] * 2)
    assert found.itl_ms == pytest.approx([50.0] * gaps)
    assert found.e2e_ms == pytest.approx([300.0] * 2)
    assert found.duration_s == pytest.approx(0.3)
    assert found.output_tokens == 10


def test_times_of_single_chunks_are_taken_where_aiperf_has_them(tmp_path: Path) -> None:
    record = aiperf()
    record["metrics"]["inter_chunk_latency"] = {"value": [40.0, 60.0], "unit": "ms"}
    assert read_run(written(tmp_path / "a.jsonl", [record]), "base").itl_ms == [40.0, 60.0]


def test_requests_that_failed_are_counted_and_warm_up_is_left_out(tmp_path: Path) -> None:
    warm, cancelled = aiperf(), aiperf()
    warm["metadata"] = {**warm["metadata"], "benchmark_phase": "warmup"}
    cancelled["metadata"] = {**cancelled["metadata"], "was_cancelled": True}
    failed = aiperf(error={"code": 500, "type": "HTTPError", "message": "out of memory"}, metrics={})
    found = read_run(written(tmp_path / "a.jsonl", [warm, aiperf(), failed, cancelled]), "base")
    assert (len(found.ttft_ms), found.failed) == (1, 2)
    report = guidellm(request(), errored=[{"request_id": "b"}], incomplete=[{"request_id": "c"}])
    assert read_run(written(tmp_path / "b.json", report), "base").failed == 2
    assert read_run(written(tmp_path / "c.json", vllm(completed=1)), "base").failed == 1


BROKEN: dict[str, tuple[str, Any, str]] = {
    "cut off": ("a.jsonl", json.dumps(aiperf())[:-9], "is no profile_export.jsonl of AIPerf"),
    "deep": ("a.jsonl", "[" * 100_000, "is no profile_export.jsonl of AIPerf"),
    "no record": ("a.jsonl", "[]", "valid dictionary"),
    "NaN": ("a.jsonl", json.dumps(aiperf()).replace("100.0", "NaN"), "finite number"),
    "negative": ("a.jsonl", json.dumps(aiperf()).replace("100.0", "-1"), "greater than or equal to 0"),
    "other unit": ("a.jsonl", json.dumps(aiperf()).replace('"sec"', '"fortnights"'), "unit 'fortnights'; expected one"),
    "not streamed": ("a.jsonl", [aiperf(metrics={})], "no time_to_first_token; run AIPerf with --streaming"),
    "empty": ("a.jsonl", "\n", "no request in it was answered"),
    "summary": ("a.json", {"request_latency": {"avg": 3}}, "give profile_export.jsonl beside it"),
    "something": ("a.json", {"x": 1}, "is no benchmarks.json of GuideLLM"),
    "sweep": ("a.json", {"benchmarks": [{}, {}]}, "2 benchmarks of GuideLLM; expected one load in a file"),
    "huge number": ("a.json", json.dumps(guidellm(request())).replace("100.0", "1e999"), "does not fit a float"),
    "duplicates": ("a.json", '{"benchmarks": [], "benchmarks": []}', "duplicate key"),
    "no requests": ("a.json", {"benchmarks": [{"requests": {"successful": None}}]}, "successful: None: "),
    "uneven": ("a.json", vllm(itls=[[0.1]]), "2 first tokens and 1 lists of others"),
    "text": ("a.json", vllm(duration="soon"), "duration: 'soon': "),
    "binary": ("a.jsonl", "\udcff", "is no profile_export.jsonl"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_hostile_file_is_one_clear_error(how: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[how]
    path = tmp_path / name
    if how == "binary":
        path.write_bytes(b"\xff\xfe")
    else:
        written(path, content)
    with pytest.raises(SettingsError, match=message) as caught:
        read_run(path, "base")
    assert str(caught.value).startswith(f"results {path}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def rounds_of(tmp_path: Path, slowdown: float) -> list[dict[str, Any]]:
    rng, rounds = random.Random(3), []
    for number in range(6):
        files: dict[str, list[str]] = {"base": [], "candidate": []}
        for role in ("base", "candidate", "candidate", "base"):
            factor = (1 + slowdown * (role == "candidate")) * rng.uniform(0.99, 1.01)
            path = tmp_path / f"{role}-{number}-{len(files[role])}.json"
            written(path, guidellm(*(request(factor) for _ in range(4))))
            files[role].append(path.name)
        rounds.append({"clients": 4, **files})
    return rounds


@pytest.mark.parametrize(("slowdown", "code"), [(0.0, 0), (0.2, 1)])
def test_rounds_from_files_are_judged_and_nothing_is_served(slowdown: float, code: int, tmp_path: Path) -> None:
    dense_dir(tmp_path / "dense")
    config = {
        "version": 1,
        "base": {"model": "dense"},
        "candidate": {"url": "http://127.0.0.1:1"},
        "speed": {
            "metrics": ["ttft_p50", "throughput"],
            "results": rounds_of(tmp_path, slowdown),
            "max_slowdown": 0.05,
        },
    }
    (tmp_path / "gate.yaml").write_text(json.dumps(config))
    assert main(["gate", "run", str(tmp_path / "gate.yaml"), "--out", str(tmp_path / "out")]) == code
    stored = report_file.load(tmp_path / "out/report.json")
    assert [round["host"] for round in stored["evidence"]["speed"]["rounds"]] == [None] * 6
    assert "read from files, nobody watched the host" in stored["results"][0]["summary"]


def test_a_failed_request_in_a_file_is_an_error_and_a_missing_file_is_known_before(tmp_path: Path) -> None:
    dense_dir(tmp_path / "dense")
    rounds = rounds_of(tmp_path, 0.0)
    config = {"version": 1, "base": {"model": "dense"}, "candidate": {"model": "dense"}, "speed": {"results": rounds}}
    written(tmp_path / rounds[2]["candidate"][1], guidellm(request(), errored=[{}]))
    assert run(GateConfig.of(config, folder=tmp_path)).verdict is Verdict.ERROR
    (tmp_path / rounds[2]["candidate"][1]).unlink()
    with pytest.raises(SettingsError, match=r"results .*candidate-2-1\.json: no such file"):
        plan(GateConfig.of(config, folder=tmp_path))
    (tmp_path / rounds[2]["candidate"][1]).write_bytes((tmp_path / rounds[0]["base"][0]).read_bytes())
    with pytest.raises(SettingsError, match=r"candidate-2-1\.json: holds the same as .*base-0-0\.json"):
        plan(GateConfig.of(config, folder=tmp_path))
    rounds[0]["candidate"].pop()
    with pytest.raises(SettingsError, match=r"speed\.results\[0\]: 2 files of the base and 1 of the candidate"):
        GateConfig.of(config)
    for verb in ("calibration", "recording"):
        rounds[0]["base"] = rounds[0]["base"][:1]
        with pytest.raises(SettingsError, match="speed"):
            getattr(GateConfig.of(config), verb)()
