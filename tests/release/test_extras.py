"""Every package that the code imports comes with the base installation, or with an extra that says so."""

from __future__ import annotations

import re
import sys
import tomllib
from typing import Any

import pytest

from sparse_serve.cli import main as cli
from sparse_serve.runtime import packages
from tests.architecture.source import ROOT, imports, python_files

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NAMES = {
    "google": ("protobuf", "googleapis-common-protos"),
    "grpc": ("grpcio",),
    "grpc_health": ("grpcio-health-checking",),
    "grpc_reflection": ("grpcio-reflection",),
    "pydantic_core": ("pydantic",),
    "pythonjsonlogger": ("python-json-logger",),
    "yaml": ("pyyaml",),
}
"""Distributions of modules that have another name."""


def required(*extras: str) -> set[str]:
    """Names of the distributions that the base installation brings, and these extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {re.split(r"[^\w.-]", line)[0] for line in lines}


def imported(package: str) -> set[str]:
    """Names of the distributions that a package imports anywhere, vLLM left out."""
    found = {name.split(".")[0] for path in python_files(package) for name in imports(path)}
    others = found - sys.stdlib_module_names - {"maskgen", "sparse_serve", "vllm"}
    return {each for name in others for each in NAMES.get(name, (name.replace("_", "-"),))}


def test_maskgen_needs_the_base_and_its_own_extras() -> None:
    assert imported("maskgen") <= required("data", "gguf", "report")


def test_sparse_serve_needs_the_server_extra_and_its_own() -> None:
    assert imported("sparse_serve") <= required("server", "report", "smg", "llama-cpp")


def test_each_way_to_serve_brings_the_server() -> None:
    for extra in ("serve", "cuda"):
        assert "sparse-serve[server]" in EXTRAS[extra]
        assert any(line.startswith("vllm") for line in EXTRAS[extra])


def test_what_the_extra_brings_is_what_is_explained() -> None:
    explained = {each for name in packages.SERVER for each in NAMES.get(name, (name.replace("_", "-"),))}
    assert explained == required("server") - required()


@pytest.mark.parametrize(
    ("verb", "lacking", "advice"),
    [
        ("serve", "vllm", "'sparse-serve[serve]', or on machines with NVIDIA GPUs 'sparse-serve[cuda]'"),
        ("serve", "starlette", "'sparse-serve[serve]', or on machines with NVIDIA GPUs 'sparse-serve[cuda]'"),
        ("generate", "grpc", "'sparse-serve[server]'"),
    ],
)
def test_a_verb_without_its_extra_ends_in_one_line(
    verb: str, lacking: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_there(verb: str, arguments: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {lacking!r}", name=lacking)

    monkeypatch.setattr(cli, "_run_verb", not_there)
    assert cli.main([verb, "x"]) == 2
    expected = f"sparse-serve: error: {lacking} is not installed; the extra for this is: pip install {advice}\n"
    assert capsys.readouterr().err == expected


def test_a_module_that_is_nobodys_extra_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(verb: str, arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'vllm.moved'", name="vllm.moved")

    monkeypatch.setattr(cli, "_run_verb", not_there)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["serve", "x"])
