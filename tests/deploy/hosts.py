"""A host with two servers behind nginx, as `deploy/rolling` means it; `start` and `stop` do what systemd does there."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.architecture.source import ROOT
from tests.deploy import scripts
from tests.vllm.serving import until

FOLDER = ROOT / "deploy/rolling"
NAMES = ("a", "b")
START_S = 300.0
STOP = """#!/bin/bash
cd "$(dirname "$0")"
echo "stop $1" >> log
kill -TERM "$(cat "$1.pid")" 2> /dev/null
while grep -qs '^State:\\s*[^Z]' "/proc/$(cat "$1.pid")/status"; do sleep 0.1; done
"""


class Host:
    """A folder with links to checkpoints, the two commands, and the settings of an nginx.

    `start` is the text of the command that starts server NAME; it writes NAME.pid and reads its ports from NAME.flags.
    Without `reload`, a real nginx is started.
    """

    def __init__(self, folder: Path, start: str, reload: str = "") -> None:
        self.folder, self._reload = folder, reload
        self.http, self.grpc, *ports = free_ports(2 + 2 * len(NAMES))
        self.addresses = dict(zip(NAMES, zip(ports[:2], ports[2:], strict=True), strict=True))
        (folder / "nginx/sparse-serve").mkdir(parents=True)
        (folder / "nginx/included.conf").write_text(self._shipped())
        (folder / "nginx/nginx.conf").write_text(
            f"worker_processes 1; error_log {folder}/nginx/error.log; pid {folder}/nginx/pid;\n"
            f"events {{}}\nhttp {{ access_log off; include included.conf; {self._folders()} }}\n"
        )
        for name, script in (("start", start), ("stop", STOP)):
            file = folder / name
            file.write_text(script.replace("{python}", sys.executable))
            file.chmod(0o755)
        for name, (http, grpc) in self.addresses.items():
            (folder / f"{name}.flags").write_text(f"--http-port {http} --grpc-port {grpc}")

    @property
    def nginx(self) -> list[str]:
        """The program with its settings."""
        return ["nginx", "-p", str(self.folder / "nginx"), "-c", str(self.folder / "nginx/nginx.conf")]

    def begin(self, checkpoint: Path) -> None:
        """Start both with a checkpoint, and nginx before them; returns when they are ready."""
        for name in NAMES:
            (self.folder / name).symlink_to(checkpoint)
            subprocess.run([self.folder / "start", name], check=True)
        for number, api in enumerate(("http", "grpc")):
            lines = (f"server 127.0.0.1:{address[number]} max_fails=0;\n" for address in self.addresses.values())
            (self.folder / f"nginx/sparse-serve/{api}.servers").write_text("".join(lines))
        if not self._reload:
            subprocess.run(self.nginx, check=True)
        until(lambda: all(map(self.is_ready, NAMES)) or "error" in self.output("a") + self.output("b"), START_S)
        assert all(map(self.is_ready, NAMES)), self.output("a") + self.output("b")

    def roll(self, *words: str | Path) -> tuple[int, str]:
        """Exit status and output of roll.py, on the servers of this host."""
        servers = [f"{name}=127.0.0.1:{http},127.0.0.1:{grpc}" for name, (http, grpc) in self.addresses.items()]
        command = [*words, *(word for server in servers for word in ("--server", server))]
        command += ["--root", self.folder, "--lists", self.folder / "nginx/sparse-serve"]
        command += ["--settle-s", "0"] if self._reload else []
        command += ["--reload", self._reload or " ".join([*self.nginx, "-s", "reload"])]
        command += ["--start", f"{self.folder}/start {{name}}", "--stop", f"{self.folder}/stop {{name}}"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = scripts.load("rolling/roll.py").main([str(word) for word in command])
        return status, said.getvalue()

    def is_ready(self, name: str) -> bool:
        """Whether a server accepts requests."""
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", self.addresses[name][0])):
                return False
            tried.settimeout(5)
            tried.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            try:
                return b" 200 " in tried.recv(20)
            except TimeoutError:
                return False

    def output(self, name: str) -> str:
        """What a server has printed."""
        file = self.folder / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def end(self) -> None:
        """Stop what runs."""
        for name in NAMES:
            if (self.folder / f"{name}.pid").exists():
                subprocess.run([self.folder / "stop", name], check=False)
        if not self._reload:
            subprocess.run([*self.nginx, "-s", "stop"], check=False)

    def _shipped(self) -> str:
        conf = (FOLDER / "nginx.conf").read_text()
        for shipped, here in (("127.0.0.1:8000", self.http), ("127.0.0.1:50051", self.grpc)):
            assert conf.count(f"listen {shipped}") == 1
            conf = conf.replace(shipped, f"127.0.0.1:{here}")
        return conf

    def _folders(self) -> str:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        return " ".join(f"{kind}_temp_path {self.folder}/nginx/{kind};" for kind in kinds)


def free_ports(count: int) -> list[int]:
    """Below those that the system gives to connections. Another process of pytest looks for them elsewhere: a server
    takes its ports long after they were found."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found: list[int] = []
    for port in range(21000 + 1000 * (worker % 10), 32000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            break
    return found
