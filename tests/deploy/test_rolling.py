"""`deploy/rolling`: a sparse checkpoint takes the dense one's place behind a real nginx, under 64 streams."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.digest import digest_file
from sparse_serve.client import Client
from sparse_serve.gate.verdict import Verdict
from tests import models
from tests.deploy import scripts
from tests.deploy.hosts import NAMES, START_S, Host
from tests.deploy.streams import Streams
from tests.sparse_serve.gate.test_report import report
from tests.vllm.serving import PROMPT, make_checkpoint, until

START = """#!/bin/bash
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 XDG_STATE_HOME=$PWD/state-$1
setsid {python} -m sparse_serve.cli.main serve "$PWD/$1" $(cat "$1.flags") --served-model-name model --enforce-eager \
  --max-model-len 1024 --max-num-seqs 64 --drain-s 300 >> "$1.log" 2>&1 < /dev/null &
echo $! > "$1.pid"
"""
SHORT, LONG = 96, 900
LENGTHS = [SHORT] * 28 + [LONG] * 4
"""Of each API. The long ones last many times longer than a rollout takes until it tells the first server to end, on a
fast machine as on one that has much else to do."""
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
GATE = """\
version: 1
base: {{model: {dense}}}
candidate: {{model: {sparse}}}
quality: {{texts: [heldout.txt], window_tokens: 48, max_windows: 16, max_ppl_increase: 100, max_kl: {max_kl:f}}}
"""
"""Half of random weights is cut: how much of them is left decides nothing, but for what `max_kl` says."""
FEW = 4
"""Clients that ask while a server starts, which would else take minutes on two cores."""
PAUSE_S = 2.0
"""Of a client of servers beside which the gate runs. Four that never pause take two cores from it for eight minutes."""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    host = Host(tmp_path, START)
    yield host
    host.end()


def is_draining(host: Host) -> bool:
    return "stopping" in host.output("a")


@scripts.WITH_DEPLOY_TESTS
@pytest.mark.timeout(1200)
def test_the_sparse_checkpoint_takes_the_dense_one_s_place_and_no_request_is_lost(host: Host) -> None:
    sparse = make_checkpoint(host.folder)
    passed = report(Verdict.PASS)
    passed.provenance["candidate_config_digest"] = digest_file(sparse / "config.json")  # type: ignore[index]
    passed.write(host.folder / "gate")
    host.begin(host.folder / "dense")
    with Client(f"127.0.0.1:{host.grpc}") as client:
        dense = {length: client.generate(PROMPT, max_tokens=length, **GREEDY).text for length in (SHORT, LONG)}
    with Streams(f"http://127.0.0.1:{host.http}", f"127.0.0.1:{host.grpc}", LENGTHS) as streams:
        streams.wait_for_answers()
        ended: list[tuple[int, str]] = []
        roll = threading.Thread(
            target=lambda: ended.append(host.roll(sparse, "--report", host.folder / "gate/report.json"))
        )
        roll.start()
        until(lambda: is_draining(host) or ended, START_S)
        streams.active = FEW
        roll.join()
        after_s, streams.active = time.monotonic(), 0
        streams.wait_for_answers()
    ((status, said),) = ended
    assert status == 0, said + host.output("a")[-3000:]
    assert [answer for answer in streams.answers if answer.lost] == []
    assert not [why for why in streams.retried if why.startswith("Refused")], "nginx has asked the other server"
    assert {answer.api for answer in streams.answers} == {"http", "grpc"}
    for length, dense_text in dense.items():
        answers = [answer for answer in streams.answers if answer.tokens == length]
        after = {answer.text for answer in answers if answer.began_s > after_s}
        assert len(after) == 1 and after != {dense_text}, "all from the sparse checkpoint"
        assert {answer.text for answer in answers} == after | {dense_text}, "each from one checkpoint"
    (running,) = re.findall(r"stopping: waiting for (\d+) running request", host.output("a"))
    assert int(running) > 0, "streams had begun when it was told to end"
    assert not any("cut off" in host.output(name) for name in NAMES)


def gate(host: Host, sparse: Path, max_kl: float) -> tuple[int, str]:
    """Exit status and output of a roll that begins with the gate."""
    (host.folder / "heldout.txt").write_text(models.TEXT[:6000])
    (host.folder / "gate.yaml").write_text(GATE.format(dense=host.folder / "dense", sparse=sparse, max_kl=max_kl))
    return host.roll(sparse, "--gate", host.folder / "gate.yaml", "--report", host.folder / "gate/report.json")


@scripts.WITH_DEPLOY_TESTS
@pytest.mark.timeout(1800)
def test_the_gate_says_whether_the_servers_are_touched(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAIL, and both go on with the dense model; PASS, and both serve the sparse one, with no request lost."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # for the gate: two models to compile take minutes
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    sparse, dense = make_checkpoint(host.folder), host.folder / "dense"
    host.begin(dense)
    streams = Streams(f"http://127.0.0.1:{host.http}", f"127.0.0.1:{host.grpc}", [SHORT] * FEW, pause_s=PAUSE_S)
    with streams:
        streams.wait_for_answers()
        status, said = gate(host, sparse, 1e-6)
        assert status == 1 and "not released: the gate ended with status 1" in said, said
        assert json.loads((host.folder / "gate/report.json").read_text())["verdict"] == "fail"
        assert {(host.folder / name).resolve() for name in NAMES} == {dense}
        assert not (host.folder / "log").exists(), "none was told to stop"
        status, said = gate(host, sparse, 100)
        assert status == 0, said + host.output("a")[-3000:]
        streams.wait_for_answers()
    assert json.loads((host.folder / "gate/report.json").read_text())["verdict"] == "pass"
    assert {(host.folder / name).resolve() for name in NAMES} == {sparse}
    assert [answer for answer in streams.answers if answer.lost] == []
    assert len({answer.text for answer in streams.answers}) == 2, "each from one checkpoint"
