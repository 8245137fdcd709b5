"""How a server can end before its time: no process is left, whatever was killed.

Each test starts what it ends, which costs tens of seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from pathlib import Path

import grpc
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.api.pb.v1 import generation_pb2_grpc
from tests.vllm.serving import (
    SPARSE_LAYERS,
    START_S,
    command_of,
    damage_digest,
    descendants,
    end,
    grpc_request,
    launch,
    make_checkpoint,
    put_on_hub,
    until,
    wait_ready,
)


def test_a_killed_engine_fails_requests_and_ends_with_1(tmp_path: Path) -> None:
    """It serves a model of the hub, as that is started differently and there is no other test of it."""
    server = launch(put_on_hub(make_checkpoint(tmp_path), tmp_path), tmp_path, f"--download-dir={tmp_path}")
    try:
        wait_ready(server)
        info = server.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.model, info.sparse_layers) == ("tests/tiny", SPARSE_LAYERS)
        assert [model["id"] for model in json.loads(server.get("/v1/models"))["data"]] == ["tests/tiny"]
        call = server.stub.GenerateStream(grpc_request(1000, pb.GenerateStreamRequest))
        next(call)
        os.kill(server.engine_pid(), signal.SIGKILL)
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            list(call)
        assert server.process.wait(START_S) == 1
        server.check_nobody_is_left()
    finally:
        end(server)


def test_a_lost_engine_is_started_again_as_often_as_allowed(tmp_path: Path) -> None:
    """The first hangs, and so does the second, after which there is none. (One that is killed is above.)"""
    flags = ("--restarts=1", "--watchdog-s=5", "--served-model-name=tiny")
    server = launch(make_checkpoint(tmp_path), tmp_path, *flags)
    try:
        wait_ready(server)
        first = server.engine_pid()
        call = server.stub.GenerateStream(grpc_request(1000, pb.GenerateStreamRequest))
        next(call)
        body = json.dumps({"prompt": "to be", "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
        wanted = urllib.request.Request(f"{server.http}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(wanted, timeout=START_S) as stream:
            assert stream.readline().startswith(b'data: {"id"')
            os.kill(first, signal.SIGSTOP)
            *_, last, done, _ = stream.read().split(b"\n\n")
        assert json.loads(last.strip().removeprefix(b"data: "))["error"]["code"] == 503 and done == b"data: [DONE]"
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            list(call)
        until(lambda: server.output.count("ready:") == 2, START_S)
        errors = (server.directory / "err").read_text()
        assert "no step for 5 s" in errors and "starting again (1 of 1)" in errors
        with grpc.insecure_channel(re.findall(r"gRPC  (\S+)", server.output)[-1]) as channel:
            reply = generation_pb2_grpc.GenerationServiceStub(channel).Generate(grpc_request(4))
        assert reply.usage.completion_tokens == 4
        server.family |= descendants(server.process.pid)
        (second,) = [pid for pid in descendants(server.process.pid) if "EngineCore" in command_of(pid)]
        assert second != first
        os.kill(second, signal.SIGSTOP)
        assert server.process.wait(START_S) == 1
        server.check_nobody_is_left()
    finally:
        end(server)


def test_an_interrupted_start_leaves_nobody_even_if_the_server_is_killed(tmp_path: Path) -> None:
    """Two servers start side by side, as most of the time is imports: one gets Ctrl-C, the other is killed.

    The killed one is stopped before, so that its engine waits for an answer to its first message.
    """
    checkpoint = make_checkpoint(tmp_path)
    servers = []
    for name in ("interrupted", "killed"):
        (tmp_path / name).mkdir()
        servers.append(launch(checkpoint, tmp_path / name))
    interrupted, killed = servers
    try:
        until(lambda: any(map(is_importing_torch, descendants(killed.process.pid))), START_S)
        killed.process.send_signal(signal.SIGSTOP)
        interrupted.engine_pid()
        interrupted.process.send_signal(signal.SIGINT)
        killed.engine_pid()
        killed.process.kill()
        assert interrupted.process.wait(START_S) == 0
        for server in servers:
            server.check_nobody_is_left()
    finally:
        for server in servers:
            end(server)


def is_importing_torch(pid: int) -> bool:
    """Whether a process is one that vLLM spawned, and is on its way to calling back."""
    try:
        return "spawn_main" in command_of(pid) and "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def test_a_damaged_model_of_the_hub_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    damage_digest(checkpoint)
    server = launch(put_on_hub(checkpoint, tmp_path), tmp_path, f"--download-dir={tmp_path}")
    try:
        assert server.process.wait(START_S) == 2
        errors = (server.directory / "err").read_text()
        assert "sparse-serve: error: " in errors and "the stored masks have digest" in errors
        assert "EngineCore" not in errors
    finally:
        end(server)
