"""The image's own probe against a server: plain, over TLS and over mutual TLS, and where nobody answers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sparse_serve.engine.fake import FakeEngine
from tests.architecture.source import ROOT
from tests.sparse_serve.running import Running, running
from tests.sparse_serve.server.test_tls import Authority

PROBE = ROOT / "deploy/container/probe.py"


async def probe(server: Running | int, path: str, settings: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and complaint of the probe, with these settings in its environment."""
    port = server if isinstance(server, int) else int(server.http.base_url.port or 0)
    environ = {"SPARSE_SERVE_HTTP_PORT": str(port), "PATH": os.environ["PATH"]}
    environ |= {f"SPARSE_SERVE_{name.upper()}": value for name, value in (settings or {}).items()}
    command = [sys.executable, "-I", str(PROBE), path]
    done = await asyncio.to_thread(subprocess.run, command, env=environ, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


async def test_it_tells_a_server_that_starts_from_one_that_is_ready() -> None:
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        assert await probe(server, "healthz") == (0, "")
        assert await probe(server, "readyz") == (1, "")
    async with running() as server:
        assert await probe(server, "readyz") == (0, "")


@pytest.mark.parametrize("is_mutual", [False, True])
async def test_it_speaks_tls_as_the_server_does(is_mutual: bool, tmp_path: Path) -> None:
    authority = Authority.new("ours")
    certificate, key = authority.write(tmp_path, "server")
    settings = {"tls_cert": str(certificate), "tls_key": str(key)}
    if is_mutual:
        (tmp_path / "ca.pem").write_bytes(authority.pem)
        settings["tls_client_ca"] = str(tmp_path / "ca.pem")
    async with running(**settings) as server:
        assert await probe(server, "readyz", settings) == (0, "")
        status, complaint = await probe(server, "readyz")
        assert status == 1 and "no answer" in complaint


async def test_nobody_there_and_wrong_usage() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        status, complaint = await probe(bound.getsockname()[1], "healthz")
    assert status == 1 and "no answer" in complaint
    assert (await probe(1, "metrics"))[0] == 2
