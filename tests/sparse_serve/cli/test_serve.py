"""What `sparse-serve serve` prints: few lines, commands that can be pasted, warnings, and everything else to a file."""

import argparse
import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from sparse_serve.cli import serve, terminal
from sparse_serve.cli.serve import Reporter, access, ready_block, warnings
from sparse_serve.cli.terminal import Terminal
from sparse_serve.engine import KernelChoice
from sparse_serve.engine.fake import INFO
from sparse_serve.runtime.load import http_address
from sparse_serve.server.lifecycle import CutOff, Draining, EngineDied, Event, Listening, Ready, Stopped
from sparse_serve.server.settings import Settings

LOG = Path("/logs/serve.log")


def printed(*start: str, model: str = "fake", grpc: str = "127.0.0.1:2") -> list[str]:
    """The words of the ready block's line that starts with these, as a shell reads it."""
    lines = ready_block(dataclasses.replace(INFO, model=model), "127.0.0.1:1", grpc).splitlines()
    (words,) = [shlex.split(line) for line in lines if shlex.join(start) in line]
    return words


@pytest.mark.parametrize("model", ["plain", "it's", 'so "called" $HOME', "back\\slash"])
def test_the_printed_request_survives_quotes_in_the_models_name(model: str) -> None:
    words = printed("curl", "http://127.0.0.1:1/v1/completions", model=model)
    assert json.loads(words[-1])["model"] == model


def test_a_model_with_a_chat_template_is_called_with_a_chat() -> None:
    chat = dataclasses.replace(INFO, chat=True)
    (line,) = [line for line in ready_block(chat, "127.0.0.1:1", "127.0.0.1:2").splitlines() if "/v1/" in line]
    words = shlex.split(line)
    assert words[1] == "http://127.0.0.1:1/v1/chat/completions"
    assert [message["role"] for message in json.loads(words[-1])["messages"]] == ["user"]


def test_the_block_says_what_a_client_has_to_show(tmp_path: Path) -> None:
    settings = Settings(api_keys="KEYS", tls_cert="C", tls_key="K", tls_client_ca="A")
    block = ready_block(INFO, "h:1", "h:2", access(settings))
    (call,) = [shlex.split(line) for line in block.splitlines() if "/v1/completions" in line]
    assert call[:7] == ["curl", "--cacert", "CA.pem", "--cert", "CLIENT.pem", "--key", "CLIENT.key"]
    assert call[7:10] == ["-H", "authorization: Bearer KEY", "https://h:1/v1/completions"]
    (line,) = [line for line in block.splitlines() if line.startswith("  with  ")]
    assert "one of KEYS" in line
    assert "with" not in ready_block(INFO, "h:1", "h:2", access(Settings()))


def test_benchmarks_and_the_gate_find_the_address() -> None:
    said = ready_block(INFO, "127.0.0.1:8000", "h:2")
    assert http_address(said) == "http://127.0.0.1:8000"
    assert http_address(said[: said.index(":8000")]) is None, "not all of it has been written"


def test_the_block_says_how_good_the_model_is() -> None:
    assert INFO.quality is not None
    (line,) = [line for line in ready_block(INFO, "h:1", "h:2").splitlines() if line.startswith("quality: ")]
    assert line == f"quality: {INFO.quality.describe()}; that is bad, and `maskgen inspect` says what to try"
    good = dataclasses.replace(INFO, quality=dataclasses.replace(INFO.quality, perplexity=21.0))
    assert "that is bad" not in ready_block(good, "h:1", "h:2")
    assert "quality" not in ready_block(dataclasses.replace(INFO, quality=None), "h:1", "h:2")


def test_the_printed_command_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "an environment"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert printed("generate", "--address")[:3] == [str(folder / "python"), "-m", "sparse_serve.cli.main"]
    (folder / "sparse-serve").touch()
    words = printed("generate", "--address", grpc="[::1]:2")
    assert words[:4] == [str(folder / "sparse-serve"), "generate", "--address", "[::1]:2"]


def said(capsys: pytest.CaptureFixture[str], *events: Event) -> tuple[str, str]:
    report = Reporter(Terminal(sys.stdout, sys.stderr, LOG), "DIR")
    for event in events:
        report(event)
    return capsys.readouterr()


def test_a_start_and_a_quiet_end_are_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    fast = dataclasses.replace(INFO, kernels={"cpu": 3})
    listening = Listening("127.0.0.1:1", "127.0.0.1:2")
    out, err = said(capsys, listening, Ready(fast, "127.0.0.1:1", "127.0.0.1:2"), Draining(0, 30), Stopped())
    assert out.startswith("\nready: fake (3 sparse layers")
    start, started, stopping, stopped = err.splitlines()
    assert "DIR" in start and str(LOG) in start and "--verbose" in start
    assert started.startswith("started in ")
    assert (stopping, stopped) == ("stopping", "stopped")
    assert len((out + err).splitlines()) <= 14


def test_requests_that_are_waited_for_or_cut_off_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, Draining(2, 30), CutOff(1, 30), EngineDied())[1].splitlines() == [
        "stopping: waiting for 2 running requests (up to 30 s)",
        "1 request did not finish in 30 s: cut off",
        f"sparse-serve: error: the engine has died; log: {LOG}",
    ]


def test_what_is_slower_than_dense_is_a_line_each() -> None:
    speedups = {1: 2.0, 4: 0.97, 16: 0.8}
    choices = tuple(KernelChoice(64, 32, "float", tokens, "cpu", speed) for tokens, speed in speedups.items())
    assert warnings(dataclasses.replace(INFO, kernels={"cpu": 3}, choices=choices)) == [
        "slower than dense for 16 tokens in a step, at worst 0.80x (a layer of 64x32, 16 tokens); "
        "`sparse-serve doctor` says more"
    ]
    assert warnings(dataclasses.replace(INFO, kernels={"reference": 2, "cpu": 1}, choices=())) == [
        "2 of 3 sparse layers run on the slow kernel `reference`; `sparse-serve doctor` says more"
    ]
    assert warnings(dataclasses.replace(INFO, kernels={"cpu": 3}, choices=choices[:2])) == []


def test_a_file_that_was_changed_since_it_was_written_is_a_line() -> None:
    lines = warnings(dataclasses.replace(INFO, kernels={"cpu": 3}, changes=("tokenizer.json: changed",)))
    assert lines == ["tokenizer.json: changed; --verify-digests refuses that"]


REDIRECT = """
import logging, os, subprocess, sys
from pathlib import Path
from sparse_serve.cli import serve, terminal
shown = terminal.redirected(Path(sys.argv[1]))
shown.say("for the person")
shown.note("a note")
print("printed")
os.write(2, b"from C++\\n")
subprocess.run([sys.executable, "-c", "import os; os.write(1, b'from a child\\\\n')"])
"""


def test_everything_but_our_lines_goes_to_the_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", REDIRECT, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("for the person\n", "a note\n")
    (log,) = tmp_path.iterdir()
    assert {"printed", "from C++", "from a child"} == set(log.read_text().splitlines())


def test_old_logs_go_and_a_living_processes_stay(tmp_path: Path) -> None:
    mine = tmp_path / f"serve-20200101-000000-{os.getpid()}.log"
    others = [tmp_path / f"serve-20200102-{at:06}-{2**22 + 1}.log" for at in range(25)]
    for file in (mine, *others):
        file.touch()
    terminal._prune(tmp_path)
    assert sorted(tmp_path.iterdir()) == [mine, *others[-20:]]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert terminal.redirected(tmp_path / "file").log is None
    assert "no log file, so the log is printed: " in capsys.readouterr().err


def test_a_user_without_a_home_gets_no_log_file_and_is_told(
    no_home: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert terminal.redirected().log is None
    monkeypatch.setattr(platformdirs, "user_log_path", lambda app, appauthor: Path("~/.local/state") / app)
    assert terminal.redirected().log is None  # as in older releases, which leave the home unresolved
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("no log file, so the log is printed: " in line for line in said)
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_ends_with_the_reason_and_the_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "sparse_serve.cli.main", "serve", str(tmp_path), f"--http-port={port}"]
        environ = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sparse-serve: error: ") and str(port) in line and "--http-port" in line
    (file,) = (tmp_path / "sparse-serve" / "log").iterdir()
    assert line.endswith(f"; log: {file}")


def test_a_server_ends_with_the_benchmark_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    command = [sys.executable, "-m", "sparse_serve.cli.main", "serve", str(tmp_path), "--http-port=0", "--grpc-port=0"]
    environ = os.environ | {"XDG_STATE_HOME": str(tmp_path), "_SPARSE_SERVE_LEADER": str(gone.pid)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_what_is_vllms_to_read_is_left_to_it() -> None:
    """`--no-convert` is ours and `--convert embed` is vLLM's."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(parser)
    args, others = parser.parse_known_args(["M", "--runner", "pooling", "--convert", "embed"])
    assert (args.no_convert, others) == (False, ["--runner", "pooling", "--convert", "embed"])
    assert parser.parse_known_args(["M", "--no-convert"])[0].no_convert
