"""`deploy/rolling/roll.py`: what is refused before anything is touched, and what becomes of a server that fails.

The servers are stand-ins that answer `/readyz` and nothing else; `test_rolling` has real ones, and nginx.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskgen.core.digest import digest_file
from sparse_serve.gate.verdict import Verdict
from tests import models
from tests.architecture.source import ROOT
from tests.deploy import scripts
from tests.deploy.hosts import NAMES, Host
from tests.docs.test_commands import check
from tests.sparse_serve.gate.test_report import report

FOLDER = ROOT / "deploy/rolling"
START = """#!/bin/bash
cd "$(dirname "$0")"
echo "start $1 $(readlink "$1")" >> log
[[ ! -e $1/none ]] || exit 3
[[ ! -e $1/bad ]] || { sleep 0 & echo $! > "$1.pid"; exit; }
setsid {python} -c '
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
' "$(cut -d" " -f2 "$1.flags")" > /dev/null 2>&1 < /dev/null &
echo $! > "$1.pid"
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Both servers serve `dense`; `sparse` is a checkpoint, `gate` has a report that lets it pass."""
    models.save("llama", tmp_path / "dense")
    models.save_sparse(tmp_path / "dense", tmp_path / "sparse")
    host = Host(tmp_path, START, reload="true")
    write_report(tmp_path)
    host.begin(tmp_path / "dense")
    yield host
    host.end()


def write_report(folder: Path, verdict: Verdict = Verdict.PASS) -> None:
    made = report(verdict)
    made.provenance["candidate_config_digest"] = digest_file(folder / "sparse/config.json")  # type: ignore[index]
    made.write(folder / "gate")


def release(host: Host, *words: str) -> tuple[int, str]:
    return host.roll(host.folder / "sparse", *(words or ("--report", str(host.folder / "gate/report.json"))))


def served(host: Host) -> list[str]:
    return [(host.folder / name).resolve().name for name in NAMES]


def log(host: Host) -> list[str]:
    return (host.folder / "log").read_text().splitlines()


def routed(host: Host) -> set[str]:
    return set(re.findall(r"server (\S+)", (host.folder / "nginx/sparse-serve/http.servers").read_text()))


def test_one_after_the_other_and_a_second_time_nothing(host: Host) -> None:
    status, said = release(host)
    assert status == 0, said
    assert served(host) == ["sparse", "sparse"] and len(routed(host)) == 2
    steps = log(host)[2:]
    assert [step.split()[:2] for step in steps] == [["stop", "a"], ["start", "a"], ["stop", "b"], ["start", "b"]]
    assert release(host)[0] == 0
    assert log(host)[2:] == steps
    assert host.roll(host.folder / "dense", "--ungated")[0] == 0, "and back"
    assert served(host) == ["dense", "dense"]


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.ERROR])
def test_without_a_pass_nothing_is_touched(verdict: Verdict, host: Host) -> None:
    write_report(host.folder, verdict)
    status, said = release(host)
    assert status == 1 and f"the verdict is {verdict.value.upper()}, expected PASS" in said
    assert len(log(host)) == 2 and served(host) == ["dense", "dense"]


def test_another_checkpoint_than_the_gated_one_is_refused(host: Host) -> None:
    file = host.folder / "sparse/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 1.0}))
    status, said = release(host)
    assert status == 1 and "is about another checkpoint (sha256:" in said
    shard = host.folder / "sparse/model.safetensors"
    write_report(host.folder)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, said = release(host)
    assert status == 1 and "the file was changed" in said
    assert len(log(host)) == 2 and served(host) == ["dense", "dense"]


def test_a_gate_that_does_not_pass_ends_it(host: Host) -> None:
    (host.folder / "gate.yaml").write_text("version: 2\n")
    status, said = release(
        host, "--gate", str(host.folder / "gate.yaml"), "--report", str(host.folder / "gate/report.json")
    )
    assert status == 2 and "the gate ended with status 2" in said
    assert len(log(host)) == 2


def test_a_server_that_does_not_get_ready_has_its_old_checkpoint_again(host: Host) -> None:
    (host.folder / "sparse/bad").touch()
    status, said = release(host, "--report", str(host.folder / "gate/report.json"), "--ready-s", "8")
    assert status == 1 and "a: did not get ready within 8 s, and serves what it had again" in said
    assert served(host) == ["dense", "dense"] and len(routed(host)) == 2
    assert [step.split()[1] for step in log(host)[2:]] == ["a"] * 4, "the other one was left alone"


def test_a_server_that_does_not_even_start_has_its_old_checkpoint_again(host: Host) -> None:
    (host.folder / "sparse/none").touch()
    status, said = release(host)
    assert status == 1 and "a: did not start: Command" in said and "serves what it had again" in said
    assert served(host) == ["dense", "dense"] and len(routed(host)) == 2
    assert not (host.folder / "a.before").is_symlink()


def test_a_run_that_was_interrupted_still_knows_the_way_back(host: Host) -> None:
    """It had given the new checkpoint to a server, which does not get ready with it."""
    (host.folder / "sparse/bad").touch()
    subprocess.run([host.folder / "stop", "a"], check=True)
    (host.folder / "a").rename(host.folder / "a.before")
    (host.folder / "a").symlink_to(host.folder / "sparse")
    status, said = release(host, "--report", str(host.folder / "gate/report.json"), "--ready-s", "8")
    assert status == 1 and "serves what it had again" in said
    assert served(host) == ["dense", "dense"] and len(routed(host)) == 2


def test_the_last_one_that_is_ready_is_not_stopped(host: Host) -> None:
    subprocess.run([host.folder / "stop", "b"], check=True)
    status, said = release(host)
    assert status == 1 and "a: no other server is ready to take its requests" in said
    assert served(host) == ["dense", "dense"]


@pytest.mark.parametrize(
    "words",
    [
        ["--server", "a=1,2"],
        ["--server", "a=h:1,h:2"],
        ["--server", "a=h:1,h:2", "--server", "a=h:3,h:4", "--ungated"],
        ["--server", "a=h:1,h:2", "--server", "b=h:3,h:4"],
        ["--server", "a=h:1,h:2", "--server", "b=h:3,h:4", "--ungated", "--report", "report.json"],
        ["--server", "a=h:1,h:2", "--server", "b=h:3,h:4", "--gate", "gate.yaml", "--report", "other.json"],
    ],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scripts.load("rolling/roll.py").main(["SPARSE", *words])
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_service_is_started_with_flags_that_exist() -> None:
    text = (FOLDER / "sparse-serve@.service").read_text()
    (command,) = re.findall(r"^ExecStart=\S+/(.*)$", text, re.MULTILINE)
    check(command)
    words = shlex.split(command)
    drain_s = float(words[words.index("--drain-s") + 1])
    assert "\nKillMode=mixed\n" in text, "a signal to the engine's processes would cut streams off"
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert float(stop_s) > drain_s, "systemd would kill it in the middle of a drain"
