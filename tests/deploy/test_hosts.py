"""`deploy/train` on two hosts, which are network namespaces: replicas and shards, and one host is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskgen.core.digest import digest_weights
from maskgen.train.log import LOG_FILE, read
from tests import models
from tests.architecture.source import ROOT
from tests.deploy import scripts
from tests.vllm.serving import until

SCRIPT = ROOT / "deploy/train/torchrun.sh"
RUN_S = 400.0
STEPS = 12


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


class Hosts:
    """Two network namespaces with one cable between them. They have nothing else, but share the disk."""

    def __init__(self) -> None:
        self.names = [f"maskgen{os.getpid()}-{number}" for number in range(2)]
        self.cables = [f"mg{os.getpid()}-{number}" for number in range(2)]
        self.addresses = ["198.18.0.1", "198.18.0.2"]  # RFC 2544: for tests of networks
        self.started: list[subprocess.Popen[bytes]] = []

    def connect(self) -> str:
        """Returns why not, or ""."""
        commands = [("netns", "add", name) for name in self.names]
        one, two = (("netns", name, "name", cable) for name, cable in zip(self.names, self.cables, strict=True))
        commands.append(("link", "add", *one[2:], *one[:2], "type", "veth", "peer", *two[2:], *two[:2]))
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            commands.append(("-n", name, "addr", "add", f"{address}/24", "dev", cable))
            commands += [("-n", name, "link", "set", device, "up") for device in (cable, "lo")]
        for command in commands:
            if (done := ip(*command)).returncode:
                return f"ip {' '.join(command)}: {done.stderr.strip()}"
        return ""

    def start(self, number: int, log: Path, *words: str) -> subprocess.Popen[bytes]:
        """The script on one host."""
        environ = os.environ | {"HEAD": self.addresses[0], "NODES": "2", "NODE": str(number), "PROCESSES": "1"}
        environ |= {"INTERFACE": self.cables[number], "ADDRESS": self.addresses[number], "PYTHON": sys.executable}
        environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = ["ip", "netns", "exec", self.names[number], SCRIPT, *words]
        with log.open("ab") as out:
            self.started.append(subprocess.Popen(command, env=environ, stdout=out, stderr=out))
        return self.started[-1]

    def kill(self, number: int) -> None:
        """All that runs on a host, at once."""
        for pid in ip("netns", "pids", self.names[number]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def clear(self) -> None:
        """Nothing runs on them any more."""
        for number in range(2):
            self.kill(number)
        for process in self.started:
            process.wait()

    def end(self) -> None:
        self.clear()
        for name in self.names:
            ip("netns", "del", name)


@pytest.fixture
def hosts(cabled: Hosts) -> Iterator[Hosts]:
    yield cabled
    cabled.clear()


@pytest.fixture(scope="module")
def cabled() -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces take root")
    hosts = Hosts()
    try:
        if why := hosts.connect():
            pytest.skip(f"no network namespaces: {why}")
        yield hosts
    finally:
        hosts.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    models.save("llama_tied", folder / "dense")
    (folder / "text.txt").write_text(models.TEXT, "utf-8")
    return folder


def words(folder: Path, out: str, *more: str) -> list[str]:
    given = ["run", "maskllm", "--model", folder / "dense", "--data", folder / "text.txt", "--out", folder / out]
    settings = ["train.steps=" + str(STEPS), "train.batch=4", "train.window_tokens=16", "train.heldout_windows=4"]
    settings += ['train.dtype="float32"', "train.lr=0.1", "method.adam_eps=1e-3", "calibration.samples=8"]
    given += [word for setting in settings for word in ("--set", setting)]
    return [str(word) for word in (*given, "--micro-batch", "2", "--checkpoint-every", "1", *more)]


def losses(out: Path) -> list[float]:
    return [record["heldout_nll"] for record in read(out / LOG_FILE) if record["kind"] == "eval"]


def run(hosts: Hosts, folder: Path, command: list[str]) -> None:
    started = [hosts.start(number, folder / f"log-{number}", *command) for number in range(2)]
    assert [process.wait(RUN_S) for process in started] == [0, 0], (folder / "log-0").read_text()[-3000:]


def run_with_a_death(hosts: Hosts, folder: Path, out: str, victim: int, command: list[str]) -> None:
    """One host dies in the middle, and is started again. The other is left alone."""
    logs = [folder / f"{out}-{number}" for number in range(2)]
    started = [hosts.start(number, logs[number], *command) for number in range(2)]
    checkpoints = folder / f"{out}.work/checkpoints"
    until(lambda: list(checkpoints.glob("step-*4")) or any(process.poll() for process in started), RUN_S)
    hosts.kill(victim)
    assert started[victim].wait(30) == -signal.SIGKILL
    assert not (folder / out).exists()
    started[victim] = hosts.start(victim, logs[victim], *command)
    assert [process.wait(RUN_S) for process in started] == [0, 0], logs[0].read_text()[-3000:]
    assert "starting again" in logs[1 - victim].read_text()


@scripts.WITH_DEPLOY_TESTS
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "victim"), [("replicas", 1), ("shards", 0)])
def test_two_hosts_go_on_to_the_same_bits_when_one_was_killed(
    kind: str, victim: int, hosts: Hosts, folder: Path
) -> None:
    shard = ["--shard"] if kind == "shards" else []
    run(hosts, folder, words(folder, f"whole-{kind}", *shard))
    run_with_a_death(hosts, folder, kind, victim, words(folder, kind, *shard))
    result, whole = folder / kind, folder / f"whole-{kind}"
    assert read(result / LOG_FILE)[0]["hardware"]["processes"] == 2
    assert (digest_weights(result), losses(result)) == (digest_weights(whole), losses(whole))
