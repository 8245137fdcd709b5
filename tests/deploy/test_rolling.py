"""`deploy/rolling`: a sparse checkpoint takes the dense one's place behind a real nginx, under 64 streams."""

from __future__ import annotations

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
FEW = 4
"""Clients that ask while a server starts, which would else take minutes on two cores."""


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
