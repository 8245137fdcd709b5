"""The processes of benchmarks and of the gate without models: loads that fail, servers that are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparse_serve.runtime import load, processes
from sparse_serve.runtime.errors import BenchError
from sparse_serve.runtime.load import Load, incomplete, serving, started
from tests.sparse_serve.bench.test_serve import REPORT

LOAD = Load(clients=2, requests=3, input_tokens=16, output_tokens=8)


def test_a_report_of_unfinished_requests_is_no_figure() -> None:
    assert incomplete(REPORT, LOAD) is None
    refused = {"completed": 4, "total_output_tokens": 32, "errors": ["", "Traceback\nValueError: too long\n", ""]}
    assert incomplete(refused, LOAD) == (
        "4 of 6 requests were answered, with 32 tokens in all; expected 8 from each (ValueError: too long)"
    )
    fewer = REPORT | {"total_output_tokens": 47}
    assert "with 47 tokens in all; expected 8 from each" in str(incomplete(fewer, LOAD))
    assert incomplete(fewer | {"itls": [[0.1] * 8] * 6}, LOAD) is None, "as many chunks as tokens, and an empty one"
    assert incomplete(fewer | {"itls": [*[[0.1] * 8] * 5, [0.1] * 6]}, LOAD) is not None
    assert incomplete(fewer | {"itls": [[0.1] * 8] * 5}, LOAD) is not None


def test_a_server_that_does_not_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match=r"ended with 2; the end of .*server\.log:\n  .*not a directory"),
        serving(tmp_path / "nothing", [], tmp_path),
    ):
        pytest.fail("it started")


def test_the_log_of_a_failure_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(load.tempfile, "tempdir", None)
    kept = []
    for error in (BenchError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), load.temporary("test-") as path:
            kept.append(path)
            raise error
    assert [path.exists() for path in kept] == [True, False]


STUB = """#!{python}
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready: a model\\n\\n  HTTP  http://127.0.0.1:1\\n", flush=True)
time.sleep(600)
"""


def test_a_server_with_its_own_environment_and_sign_of_being_up(tmp_path: Path) -> None:
    code = "import os, sys, time; sys.stderr.write('logged'); print(os.environ['WHO'], flush=True); time.sleep(600)"
    asked: list[str] = []

    def address(said: str) -> str | None:
        asked.append(said)
        return "http://there" if said == "me\n" else None

    with started("it", [sys.executable, "-c", code], tmp_path, "one", {"WHO": "me"}, address) as server:
        assert (server.url, server.out.name, server.log.name) == ("http://there", "one.out", "one.log")
        assert 0 < server.start_s < 60 and asked[-1] == "me\n"
        pid = server.pid
    assert server.said() == "me\nlogged" and not psutil.pid_exists(pid)
    failing = [sys.executable, "-c", "raise SystemExit('no room')"]
    with (
        pytest.raises(BenchError, match=r"^it ended with 1; the end of .*two\.log:\n  no room$"),
        started("it", failing, tmp_path, "two", address=address),
    ):
        pytest.fail("it started")


@pytest.mark.parametrize("error", [BenchError, KeyboardInterrupt])
def test_a_server_that_ignores_us_is_gone_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    monkeypatch.setattr(load.sys, "executable", str(stub))
    monkeypatch.setattr(load, "_STOP_S", 0.1)
    before = processes.descendants(os.getpid())
    with pytest.raises(error), serving(tmp_path, [], tmp_path) as url:
        assert url == "http://127.0.0.1:1"
        family = processes.descendants(os.getpid()) - before
        assert len(family) >= 2
        raise error("somewhere in the middle")
    deadline_s = time.monotonic() + 60
    while any(map(processes.is_alive, family)):
        assert time.monotonic() < deadline_s


def fake_load(monkeypatch: pytest.MonkeyPatch, work_dir: Path, code: int, report: dict[str, Any] | None) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert {"--num-prompts=6", "--max-concurrency=2", "--random-output-len=8"} <= set(command)
        options["stdout"].write(b"first\nValueError: no tokenizer\n")
        if report is not None:
            (work_dir / "report.json").write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(load.subprocess, "run", run)


@pytest.mark.parametrize(
    ("code", "report", "message"),
    [
        (1, REPORT, "ended with 1"),
        (0, None, "ended with 0"),
        (0, REPORT | {"completed": 5}, r"5 of 6 requests were answered, .* \(no reason was given\)"),
    ],
)
def test_load_that_fails_is_an_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, report: dict[str, Any] | None, message: str
) -> None:
    fake_load(monkeypatch, tmp_path, code, report)
    with pytest.raises(BenchError, match=message + r"; the end of .*load\.log:\n  first\n  ValueError: no tokenizer"):
        load.bench_serve("http://127.0.0.1:1", tmp_path, LOAD, 0, tmp_path)


GENERATOR = """#!{python}
import json, sys, time
if sys.argv[-1] != "sparse_serve.cli.load_generator": sys.exit("not asked for")
for line in sys.stdin:
    asked = json.loads(line)
    open(asked["log"], "w").write(" ".join(asked["flags"]))
    if "--die" in asked["flags"]: sys.exit("too little memory")
    print(7 if "--fail" in asked["flags"] else 0, flush=True)
time.sleep(600)
"""


def test_a_load_generator_runs_often_and_its_death_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "python"
    stub.write_text(GENERATOR.format(python=sys.executable))
    stub.chmod(0o755)
    monkeypatch.setattr(load.sys, "executable", str(stub))
    before = processes.descendants(os.getpid())
    with load.load_generator(tmp_path) as run:
        assert [run(["--a"], tmp_path / "1"), run(["--fail"], tmp_path / "2")] == [0, 7]
        assert (tmp_path / "1").read_text() == "--a"
        with pytest.raises(BenchError, match=r"load generator ended with 1; the end of .*\n  too little memory"):
            run(["--die"], tmp_path / "3")
        with pytest.raises(BenchError, match="load generator ended with 1"):
            run(["--a"], tmp_path / "4")
    with load.load_generator(tmp_path):
        family = processes.descendants(os.getpid()) - before
        assert family
    assert not any(map(processes.is_alive, family))


def test_a_report_loses_its_requests_and_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_load(monkeypatch, tmp_path, 0, REPORT | {"model_id": str(tmp_path), "tokenizer_id": str(tmp_path)})
    report = load.bench_serve("http://127.0.0.1:1", tmp_path, LOAD, 0, tmp_path)
    assert report["errors"] == [""] * 6
    assert load.summary(report) == {name: value for name, value in REPORT.items() if name != "errors"}
