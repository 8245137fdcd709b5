"""Servers that fail while their speed is measured with the real load generator, and an engine that is killed: each is
an error of the gate, never a verdict. The servers are small; the one that is killed is a process."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from sparse_serve.gate import report_file
from tests import models
from tests.sparse_serve.gate import servers
from tests.vllm.offline import make_sparse
from tests.vllm.serving import command_of, descendants

SPEED = """
version: 1
base: {{url: "{base}", tokenizer: dense}}
candidate: {{url: "{candidate}"}}
speed: {{clients: [1], requests: 2, input_tokens: 4, output_tokens: 5, metrics: [ttft_p50], budget_s: 1}}
"""


def gate(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sparse_serve.cli.main", "gate", *arguments, "--out", "report"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True)


def assert_error(folder: Path, process: subprocess.Popen[str], message: str) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3, err[-3000:]
    assert message in err
    report = report_file.load(folder / "report/report.json")
    assert (report["verdict"], report["results"][0]["check"]) == ("error", "measurement")


def breaking(how: str) -> AbstractContextManager[str]:
    if how == "killed":
        return servers.killed_at(5)
    stream = {"ends early": servers.first_tokens, "fails in the stream": servers.fails_in_the_stream}[how]
    return servers.server(servers.of_vllm(), stream=stream)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["killed", "ends early", "fails in the stream"])
def test_a_server_that_fails_under_load_is_an_error(how: str, tmp_path: Path) -> None:
    models.save("llama", tmp_path / "dense")
    with servers.server(servers.of_vllm()) as base, breaking(how) as candidate:
        (tmp_path / "gate.yaml").write_text(SPEED.format(base=base, candidate=candidate))
        assert_error(tmp_path, gate(tmp_path, "run", "gate.yaml"), "requests were answered, with ")


@pytest.mark.timeout(300)
def test_an_engine_that_is_killed_while_it_scores_is_an_error(tmp_path: Path) -> None:
    make_sparse("llama", tmp_path)
    (tmp_path / "data.txt").write_text(models.TEXT * 5, "utf-8")
    process = gate(tmp_path, "--dense", "base", "--sparse", "sparse", "--data", "data.txt", "--window", "48")

    assert process.stderr is not None
    seen = next(line for line in process.stderr if "scoring" in line)
    assert "windows through the engine" in seen
    (engine,) = [pid for pid in descendants(process.pid) if "EngineCore" in command_of(pid)]
    psutil.Process(engine).kill()
    assert_error(tmp_path, process, "sparse-serve: error: the engine has died")
