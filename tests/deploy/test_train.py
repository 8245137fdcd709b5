"""`deploy/train`: what SLURM and JobSet run is the script that two hosts are tested with, with variables it knows."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from maskgen.cli.parser import build_parser
from tests.architecture.source import ROOT

FOLDER = ROOT / "deploy/train"
SCRIPT = FOLDER / "torchrun.sh"
WORDS = ["run", "maskllm", "--model", "a b", "--data", "TEXT", "--out", "OUT"]


def program(folder: Path, name: str, text: str) -> Path:
    """A stand-in on the PATH."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(stat.S_IRWXU)
    return file


def run(command: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_it_starts_torchrun_on_this_host(tmp_path: Path) -> None:
    python = program(tmp_path, "python", 'printf "%s|" "$GLOO_SOCKET_IFNAME" "$@"')
    ran = run([SCRIPT, *WORDS], HEAD="h0", NODES="3", NODE="2", PYTHON=str(python), INTERFACE="ib0")
    assert ran.returncode == 0, ran.stderr
    given = ran.stdout.rstrip("|").split("|")
    assert given[0] == "ib0" and given[1:3] == ["-m", "torch.distributed.run"]
    assert given[given.index("-m", 3) :] == ["-m", "maskgen", *WORDS]
    flags = dict(zip(given[3:-10:2], given[4:-9:2], strict=True))
    assert flags == {
        "--nnodes": "3",
        "--max-restarts": "0",
        "--nproc-per-node": "auto",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "maskgen",
        "--rdzv-endpoint": "h0:29400",
        "--rdzv-conf": "is_host=false,read_timeout=900,join_timeout=900",
    }


@pytest.mark.parametrize(
    ("node", "address", "expected"),
    [("0", "", "--local-addr|h0|"), ("0", "h0.rack", "--local-addr|h0.rack|"), ("1", "h1", "--local-addr|h1|")],
)
def test_the_others_reach_it_by_this_address(node: str, address: str, expected: str, tmp_path: Path) -> None:
    python = program(tmp_path, "python", 'printf "%s|" "$@"')
    ran = run([SCRIPT, *WORDS], HEAD="h0", NODES="3", NODE=node, PYTHON=str(python), ADDRESS=address)
    assert ran.returncode == 0, ran.stderr
    assert expected in ran.stdout and f"is_host={'true' if node == '0' else 'false'}," in ran.stdout


def test_a_host_starts_again_so_often_and_then_gives_up(tmp_path: Path) -> None:
    python = program(tmp_path, "python", f"echo started >> {tmp_path}/log; exit 7")
    program(tmp_path, "sleep", "exit 0")
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = run([SCRIPT, *WORDS], HEAD="h0", NODES="2", NODE="1", PYTHON=str(python), RESTARTS="2", PATH=path)
    assert ran.returncode == 1
    assert (tmp_path / "log").read_text().count("started") == 3
    assert "host 1: failed; starting again in 5 s (2 of 2)" in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_asks_it_to_end_ends_the_training_for_good(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    told = f"trap 'echo told >> {log}; exit 1' {number.name}"
    python = program(tmp_path, "python", f"{told}; echo $$ started >> {log}; sleep 30 & wait")
    environ = {"PATH": os.environ["PATH"], "HEAD": "h0", "NODES": "2", "NODE": "1", "PYTHON": str(python)}
    running = subprocess.Popen([SCRIPT, *WORDS], env=environ, start_new_session=True)
    deadline_s = time.monotonic() + 30
    while not (log.is_file() and "started" in log.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    running.send_signal(number)
    assert running.wait(30) == 128 + number
    started, told = log.read_text().splitlines()
    assert told == "told"
    assert not Path(f"/proc/{started.split()[0]}").exists(), "it ends after what it has started"


@pytest.mark.parametrize("missing", ["HEAD", "NODES", "NODE"])
def test_a_missing_variable_is_named(missing: str) -> None:
    variables = {"HEAD": "h0", "NODES": "2", "NODE": "0"}
    del variables[missing]
    ran = run([SCRIPT, *WORDS], **variables)
    assert ran.returncode and f"{missing}: the " in ran.stderr


def test_slurm_runs_it_on_every_node(tmp_path: Path) -> None:
    """Its two programs are stand-ins."""
    bin_ = tmp_path / "bin"
    program(bin_, "scontrol", '[[ "$*" == "show hostnames n[1-2]" ]] && printf "n1\\nn2\\n"')
    program(bin_, "srun", 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')
    python = program(bin_, "python", 'printf "%s|" "$@"; echo')
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "31234"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": str(python), "PATH": f"{bin_}:{os.environ['PATH']}"}
    ran = run(["bash", FOLDER / "slurm.sbatch", *WORDS], **slurm)
    assert ran.returncode == 0, ran.stderr
    for number, line in enumerate(ran.stdout.splitlines()):
        assert "--nnodes|2|" in line and "--rdzv-endpoint|n1:21234|" in line
        assert f"is_host={'false' if number else 'true'}," in line
        assert line.endswith("|".join(["maskgen", *WORDS, ""]))


def test_the_job_set_runs_it_in_every_pod() -> None:
    job_set = yaml.safe_load((FOLDER / "jobset.yaml").read_text("utf-8"))
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
    name = job_set["metadata"]["name"]
    assert variables["HEAD"] == f"{name}-{job['name']}-0-0.{name}", "the name of the first pod"
    assert variables["NODES"] == str(spec["completions"]) == str(spec["parallelism"])
    known = set(re.findall(r"^# ([A-Z]+) ", SCRIPT.read_text(), re.MULTILINE)) | {"NODES", "NODE"}
    assert set(variables) - {"HF_HUB_OFFLINE"} <= known
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert container["command"] == ["bash", f"{mounts['script']}/{SCRIPT.name}"]
    assert mounts.keys() == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    parsed = build_parser().parse_args(container["args"])
    assert parsed.shard and str(parsed.out).startswith(mounts["models"])
