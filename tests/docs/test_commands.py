"""Every command that README and the manual show is one that its program takes: verbs, flags and values that exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex

import pytest

from maskgen.cli.parser import build_parser
from sparse_serve.cli import main as serve_cli
from tests.architecture.source import ROOT
from tests.deploy import scripts
from tests.docs.pages import Block, blocks, commands

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
VERBS = set(re.findall(r"^([a-z]+):.*?## ", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE)) | {"PIP_EXTRA_INDEX_URL"}
OTHERS = {
    "apt-get", "chmod", "cp", "curl", "docker", "export", "git", "grpcurl", "helm", "kubectl", "ln", "mkdir", "nginx",
    "pip", "printf", "promtool", "python3", "serve", "systemctl", "useradd",
}  # fmt: skip
SCRIPTS = {"deploy/train/torchrun.sh", "deploy/train/slurm.sbatch"}
"""What takes maskgen's words behind its own."""


def check(command: str) -> None:
    """Raises AssertionError or SystemExit for a command that its program would refuse."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # a variable for the program
        words = words[1:]
    program, arguments = words[0].rpartition("bin/")[2], words[1:]
    if script := SCRIPTS & set(words):
        (name,) = script
        assert (ROOT / name).is_file()
        build_parser().parse_args(words[words.index(name) + 1 :])
    elif program == "maskgen":
        build_parser().parse_args(arguments)
    elif program == "sparse-serve":
        _check_server(arguments)
    elif program == "make":
        _check_make(arguments)
    elif program == "python" and arguments[0] == "-c":
        ast.parse(arguments[1])
    elif program == "python":
        scripts.load(arguments[0].removeprefix("deploy/")).parser().parse_args(arguments[1:])
    else:
        assert program in OTHERS, command


def _check_server(arguments: list[str]) -> None:
    verb = arguments[0]
    assert verb in serve_cli._VERBS, verb
    parser = argparse.ArgumentParser(prog=f"sparse-serve {verb}", allow_abbrev=False)
    importlib.import_module(f"sparse_serve.cli.{verb}").add_arguments(parser)
    _, others = parser.parse_known_args(arguments[1:])
    assert not others or verb in serve_cli._TAKES_VLLMS_FLAGS, others


def _check_make(arguments: list[str]) -> None:
    assert {word for word in arguments if "=" not in word} <= VERBS, arguments
    assert {word.partition("=")[0] for word in arguments if "=" in word} <= VARIABLES, arguments


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_the_commands_are_legal(block: Block) -> None:
    assert block.commands, f"{block}: nothing behind a `$ `"
    for command in block.commands:
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        "maskgen prune admm",
        "maskgen run admm --out OUT --sampels 3",
        "sparse-serve doctor --all",
        "sparse-serve watch SPARSE",
        "make servee",
        "make serve MODLE=x",
        "python -m tests.bench.quality",
        "python deploy/rolling/roll.py SPARSE --sever a=h:1,h:2",
        "HEAD=h0 deploy/train/torchrun.sh run maskllm --moddel DENSE",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(command)


def test_what_a_block_is() -> None:
    assert commands("$ one --a \\\n    b   # why\nits output\n$ two\n") == ("one --a      b   # why", "two")
    shown = {block.page for block in blocks() if not block.why_not}
    assert {"README.md", "docs/index.md", "docs/prune.md", "docs/serving.md", "docs/gate.md"} <= shown
