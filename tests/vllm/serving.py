"""A server process as users run it, for tests: started, looked at, and certainly gone afterwards."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.api.pb.v1 import generation_pb2_grpc
from sparse_serve.runtime import processes
from tests import models

START_S = 150.0
PROMPT = "On day 3 the tall child"
SHAPE: dict[str, Any] = {"hidden_size": 128, "max_position_embeddings": 1024}
SPARSE_LAYERS = 4 * models.LAYERS  # qkv, o, gate_up, down: vLLM fuses three and two of the checkpoint's seven


@dataclass
class Running:
    """A server process. `family` holds every process it has been seen to start."""

    process: subprocess.Popen[bytes]
    directory: Path
    family: set[int]

    @property
    def output(self) -> str:
        return (self.directory / "out").read_text()

    @property
    def http(self) -> str:
        return re.findall(r"HTTP  (\S+)", self.output)[0]

    @property
    def grpc_address(self) -> str:
        return re.findall(r"gRPC  (\S+)", self.output)[0]

    @functools.cached_property
    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc_address)

    @property
    def stub(self) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    def get(self, path: str, body: Any = None) -> Any:
        with self.open(path, body) as response:
            return response.read().decode()

    def open(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.http + path, data, {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        for line in self.get("/metrics").splitlines():
            if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def engine_pid(self) -> int:
        """The id of vLLM's engine process, once there is one."""

        def found() -> list[int]:
            self.family |= descendants(self.process.pid)
            return [pid for pid in self.family if "EngineCore" in command_of(pid)]

        until(lambda: found() or self.process.poll() is not None, START_S)
        return found()[0]

    def check_nobody_is_left(self) -> None:
        until(lambda: not any(map(is_alive, self.family)), 60.0)


def descendants(pid: int) -> set[int]:
    """Ids of all living processes below one."""
    return {process.pid for process in processes.descendants(pid)}


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.02)


def wait_idle(process: psutil.Process) -> None:
    """Until a process has nothing to do for a while, or has ended."""
    asleep = 0

    def is_idle() -> bool:
        nonlocal asleep
        asleep = 0 if processes.is_alive(process) and process.status() == psutil.STATUS_RUNNING else asleep + 1
        return asleep > 25

    until(is_idle, 60.0)


def launch(model: Path | str, directory: Path, *flags: str) -> Running:
    command = [
        sys.executable,
        "-m",
        "sparse_serve.cli.main",
        "serve",
        str(model),
        "--http-port=0",
        "--grpc-port=0",
        *flags,
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes its time; `test_compiled` does
    environ["XDG_STATE_HOME"] = str(directory)  # where its log goes
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=err, start_new_session=True)
    return Running(process, directory, set())


def wait_ready(server: Running) -> Running:
    until(lambda: "ready:" in server.output or server.process.poll() is not None, START_S)
    assert server.process.poll() is None, (server.directory / "err").read_text()[-3000:]
    server.family |= descendants(server.process.pid)
    return server


def end(server: Running) -> None:
    """Whatever a failed test left."""
    for pid in {server.process.pid} | server.family | descendants(server.process.pid):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    server.process.wait()
    if "channel" in vars(server):
        server.channel.close()


def make_checkpoint(root: Path) -> Path:
    """A sparse checkpoint that vLLM's CPU attention can run."""
    models.save("llama", root / "dense", **SHAPE)
    models.save_sparse(root / "dense", root / "sparse")
    return root / "sparse"


def damage_digest(checkpoint: Path) -> None:
    """Legal masks that are not the manifest's: only reading all of them can tell."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["mask_digest"] = "sha256:" + "1" * 64
    file.write_text(json.dumps(config))


def grpc_request(max_tokens: int, kind: Any = pb.GenerateRequest, **sampling: Any) -> Any:
    return kind(text=PROMPT, sampling=pb.Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True, **sampling))


def http_request(max_tokens: int, **more: Any) -> dict[str, Any]:
    fixed = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    return {**fixed, "max_tokens": max_tokens, **more}


def http_error(server: Running, path: str, body: Any = None) -> urllib.error.HTTPError:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.get(path, body)
    caught.value.close()
    return caught.value


def running_requests(server: Running) -> float:
    return server.metric("vllm:num_requests_running")


def put_on_hub(checkpoint: Path, cache: Path) -> str:
    """Make a checkpoint look like a downloaded model of the hub; serve it with `--download-dir={cache}`."""
    folder = cache / "models--tests--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots").mkdir()
    checkpoint.rename(folder / "snapshots" / ("a" * 40))
    return "tests/tiny"
