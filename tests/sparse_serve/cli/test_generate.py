"""`sparse-serve generate`, against a server with a fake engine."""

import asyncio
import subprocess
import sys

import pytest

from sparse_serve.cli import main as cli
from tests.sparse_serve.running import Running, running


async def generate(server: Running, *flags: str) -> int:
    return await asyncio.to_thread(cli.main, ["generate", "--address", server.grpc_address, *flags, "abc"])


async def test_the_answer_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as server:
        assert await generate(server, "--max-tokens", "5", "--temperature", "0") == 0
    assert capsys.readouterr().out == "abcab\n"
    assert server.engine.requests[0].sampling.temperature == 0


async def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as server:
        assert await generate(server, "--temperature", "-1") == 2
    error = capsys.readouterr().err
    assert "INVALID_ARGUMENT: temperature is -1.0" in error and "Traceback" not in error


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--address", "127.0.0.1:1", "--timeout-s", "5", "abc"]) == 2
    assert "127.0.0.1:1: UNAVAILABLE" in capsys.readouterr().err


def test_a_number_the_protocol_has_no_room_for_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--max-tokens", "-1", "abc"]) == 2
    assert "--max-tokens" in capsys.readouterr().err


def test_a_client_does_not_import_the_server() -> None:
    code = "import sys, sparse_serve.cli.main, sparse_serve.cli.generate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "grpc" in loaded
    assert not {"uvicorn", "starlette", "prometheus_client", "pydantic", "torch", "numpy"} & set(loaded)
