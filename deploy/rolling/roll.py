"""Give servers behind nginx another checkpoint, one server after the other, and lose no request.

    roll.py SPARSE --report gate/report.json --server a=127.0.0.1:8001,127.0.0.1:50061 --server b=...

Nothing is touched unless the report of `sparse-serve gate` is a PASS of this very checkpoint. Each server NAME serves
what the symbolic link ROOT/NAME leads to. For one after the other, while another one is ready:

    out     nginx's lists name it no more; what it was given before goes on
    stop    SIGTERM: running requests are finished, within the server's --drain-s
    start   the link leads to the new checkpoint
    ready   `/readyz` says so, or the link goes back and the server starts with what it had: exit status 1
            (until then ROOT/NAME.before leads to that)
    in      nginx's lists name it again

A server that has the checkpoint already is passed over, so a run that was interrupted is repeated.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import digest_file
from maskgen.core.errors import SparseError
from sparse_serve.gate import report_file

LISTS = ("http", "grpc")
"""Files of nginx, each with one `server` line for every server that gets requests."""

_ASK_S = 0.5


class NotReleased(Exception):
    """Why the new checkpoint is not served, or not by all servers."""


@dataclass(frozen=True)
class Server:
    """`http` and `grpc` are HOST:PORT as nginx reaches them."""

    name: str
    http: str
    grpc: str

    @classmethod
    def parse(cls, text: str) -> Server:
        """NAME=HTTP,GRPC. Raises `ValueError` for anything else."""
        name, _, addresses = text.partition("=")
        http, _, grpc = addresses.partition(",")
        if not (name.isidentifier() and ":" in http and ":" in grpc):
            raise ValueError(text)
        return cls(name, http, grpc)

    def is_ready(self) -> bool:
        """Whether it takes requests."""
        try:
            with build_opener(ProxyHandler({})).open(f"http://{self.http}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, HTTPException):
            return False


def check_report(report: Path, checkpoint: Path) -> None:
    """Raise `NotReleased` unless the report is a PASS of this checkpoint, `SparseError` for a damaged file.

    The digest is that of config.json, which has the digest of every shard; these are read and compared.
    """
    found = report_file.load(report)
    if found["verdict"] != "pass":
        raise NotReleased(f"{report}: the verdict is {found['verdict'].upper()}, expected PASS")
    gated, here = found["provenance"].get("candidate_config_digest"), digest_file(checkpoint / "config.json")
    if gated != here:
        raise NotReleased(f"{report}: is about another checkpoint ({gated}) than {checkpoint} ({here})")
    SparseCheckpoint.open(checkpoint, verify_bits=False).verify_digests()


class Rollout:
    """One run. `args` are the flags."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._servers: Sequence[Server] = args.server

    def run(self, checkpoint: Path) -> None:
        """Give it to all servers. Raises `NotReleased`, `CalledProcessError` for a command that failed."""
        for server in self._servers:
            if self._link(server).resolve() == checkpoint and server.is_ready():
                self._before(server).unlink(missing_ok=True)
                say(f"{server.name}: has it already")
                continue
            self._replace(server, checkpoint)
        self._route(self._servers)

    def _replace(self, server: Server, checkpoint: Path) -> None:
        others = [other for other in self._servers if other != server and other.is_ready()]
        if not others:
            raise NotReleased(f"{server.name}: no other server is ready to take its requests")
        kept = self._before(server)
        if not kept.is_symlink():  # else an interrupted run has left it, and the link leads to what did not get ready
            kept.symlink_to(self._link(server).resolve())
        before = kept.resolve()
        self._route(others)
        if not self._restarts(server, checkpoint):
            ready = self._restarts(server, before)
            self._route([*others, server] if ready else others)
            if ready:
                kept.unlink()
            state = "serves what it had again" if ready else f"does not get ready with {before} either"
            raise NotReleased(f"{server.name}: did not get ready within {self._args.ready_s:g} s, and {state}")
        kept.unlink()
        self._route([*others, server])
        say(f"{server.name}: serves {checkpoint}")

    def _link(self, server: Server) -> Path:
        return Path(self._args.root, server.name)

    def _before(self, server: Server) -> Path:
        return Path(self._args.root, f"{server.name}.before")

    def _restarts(self, server: Server, checkpoint: Path) -> bool:
        """Whether it gets ready with it."""
        say(f"{server.name}: stopping, once its requests have ended")
        self._command(self._args.stop, server)
        link = self._link(server)
        new = link.with_name(f"{link.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(checkpoint)
        new.replace(link)
        say(f"{server.name}: starting with {checkpoint}")
        try:
            self._command(self._args.start, server)
        except subprocess.CalledProcessError as error:
            say(f"{server.name}: did not start: {error}")
            return False
        return self._gets_ready(server)

    def _gets_ready(self, server: Server) -> bool:
        deadline_s = time.monotonic() + self._args.ready_s
        while not server.is_ready():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_ASK_S)
        return True

    def _route(self, servers: Sequence[Server]) -> None:
        """Requests that come from now on go to these servers."""
        for name in LISTS:
            lines = "".join(f"server {getattr(server, name)} max_fails=0;\n" for server in servers)
            file = Path(self._args.lists, f"{name}.servers")
            new = file.with_suffix(".new")
            new.write_text(lines)
            new.replace(file)
        self._command(self._args.reload)
        # nginx's former processes get to know a little later, and may have accepted a request in between
        time.sleep(self._args.settle_s)

    def _command(self, command: str, server: Server | None = None) -> None:
        name = {} if server is None else {"name": server.name}
        subprocess.run(shlex.split(command.format(**name)), check=True)


def say(line: str) -> None:
    """Print at once, also into a log."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The flags; each default is what a Debian host with systemd has."""
    made = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add: Any = made.add_argument
    add("checkpoint", type=Path, metavar="SPARSE", help="directory of the checkpoint that all servers shall serve")
    add("--report", type=Path, metavar="FILE", help="report.json of `sparse-serve gate` about SPARSE")
    add("--gate", type=Path, metavar="gate.yaml", help="run this gate first; its report is written beside --report")
    add("--ungated", action="store_true", help="without a report: back to a checkpoint that was served before")
    add("--server", action="append", type=Server.parse, required=True, metavar="NAME=HTTP,GRPC", help="at least two")
    add("--root", type=Path, default=Path("/srv/sparse-serve"), help="folder of the links (default: %(default)s)")
    add("--lists", type=Path, default=Path("/etc/nginx/sparse-serve"), help="of nginx's lists (default: %(default)s)")
    add("--reload", default="nginx -s reload", help="(default: %(default)s)")
    add("--stop", default="systemctl stop sparse-serve@{name}", help="returns when it has ended (default: %(default)s)")
    add("--start", default="systemctl start sparse-serve@{name}", help="(default: %(default)s)")
    add("--ready-s", type=float, default=600.0, help="seconds a new server gets to be ready (default: %(default)s)")
    add("--settle-s", type=float, default=1.0, help="seconds after a reload of nginx (default: %(default)s)")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Exit status 0: all servers serve the checkpoint; 1: not; 2: wrong usage; others are the gate's."""
    flags = parser()
    args = flags.parse_args(words)
    if len({server.name for server in args.server}) < 2:
        flags.error("--server: expected at least two, each with a name of its own")
    if (args.report is None) != args.ungated or (args.gate and args.ungated):
        flags.error("expected --report, with or without --gate; or --ungated alone")
    if args.gate and args.report.name != "report.json":
        flags.error(f"--report {args.report}: expected FOLDER/report.json, which is what --gate writes")
    checkpoint = args.checkpoint.resolve()
    try:
        if args.gate:
            gate = [sys.executable, "-m", "sparse_serve.cli.main", "gate", "run", str(args.gate)]
            status = subprocess.run([*gate, "--out", str(args.report.parent)], check=False).returncode
            if status:
                say(f"not released: the gate ended with status {status}")
                return status
        if not args.ungated:
            check_report(args.report, checkpoint)
        Rollout(args).run(checkpoint)
    except (NotReleased, SparseError, OSError, subprocess.CalledProcessError) as error:
        say(f"not released: {error}")
        return 1
    say("released")
    return 0


if __name__ == "__main__":
    sys.exit(main())
