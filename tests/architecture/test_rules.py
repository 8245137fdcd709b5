"""The rules that keep the code base small and its arrows pointing one way. A failure lists every place and its rule.

Which room may import which is in `.importlinter`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from tests.architecture.source import GENERATED, PACKAGES, ROOT, files, imports, python_files, tree

CORE_MAY_IMPORT = {"torch", "safetensors", "numpy", "maskgen"}
RUNS_CODE_FROM_DATA = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

FILE_LINES, FUNCTION_LINES = 300, 60
PAGE = "docs/architecture.md"
EVERY_FILE = python_files(*PACKAGES)


def test_the_files_are_found() -> None:
    assert {"maskgen/core/pattern.py", "sparse_serve/server/settings.py"} <= set(EVERY_FILE)


def test_imports_keep_the_contracts() -> None:
    """In a process of its own: import-linter's logging set-up switches off the loggers of the tests that follow."""
    config = {"config_filename": str(ROOT / ".importlinter"), "no_cache": True, "no_logo": True}
    code = f"import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(**{config}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " KEPT" in ran.stdout


def test_no_import_is_relative() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path in python_files(*PACKAGES, "deploy", "docs", "proto", "tests")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not found, "write the full name"


def test_core_stands_alone() -> None:
    allowed = CORE_MAY_IMPORT | sys.stdlib_module_names
    found = [
        f"{path} imports {name}"
        for path in python_files("maskgen/core")
        for name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert not found


def test_data_is_never_run() -> None:
    found = []
    for path in EVERY_FILE:
        found += [f"{path} imports {name}" for name in imports(path) if name.split(".")[0] in RUNS_CODE_FROM_DATA]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {"eval", "exec", "__import__", "torch.load"}:
                    found.append(f"{path}:{node.lineno}: {called}")
            elif isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
                found += [f"{path}:{node.value.lineno}: {node.arg}"] * (ast.unparse(node.value) != "False")
    assert not found


def functions(path: str) -> dict[str, int]:
    """Lines of each function, by place."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    return {f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1 for node in found if node.end_lineno}


def test_files_and_functions_fit_the_budget() -> None:
    """What is longer is more than one thing: split it."""
    hand_written = python_files(*PACKAGES, "deploy", "docs", "proto", "tests")
    sizes = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path in hand_written}
    long_files = {path: lines for path, lines in sizes.items() if lines > FILE_LINES}
    long_functions = {
        place: lines for path in hand_written for place, lines in functions(path).items() if lines > FUNCTION_LINES
    }
    assert (long_files, long_functions) == ({}, {})


def test_nothing_names_a_private_place() -> None:
    """No path of somebody's machine; no package host, because everybody has their own index."""
    places = [rf"(?<![\w.~])/{folder}/" for folder in ("work", "farm", "tmp/w")]
    hosts = [re.escape(host) for host in ("pypi" + ".org", "python" + "hosted", "download." + "pytorch")]
    private = re.compile("|".join(places + hosts))
    found = []
    for path in files():
        text = (ROOT / path).read_text("utf-8", errors="replace")
        found += [f"{path}: {match.group()}" for match in private.finditer(text)]
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_is_free(package: str) -> None:
    program = (
        "import sys, time; began = time.process_time(); "
        f"import {package}; took_s = time.process_time() - began; "
        "heavy = {'torch', 'vllm', 'transformers', 'grpc', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; assert took_s < 1, took_s"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def on_disk() -> set[str]:
    """What the tree of docs/architecture.md must show; folders end in a slash.

    Every file of the packages, `docs/`, `proto/`, `deploy/` and the top, but package markers, hidden files, generated
    code and what is below the first level of `tests/`.
    """
    shown: set[str] = set()
    for name in files():
        path = PurePosixPath(name)
        if path.parts[0] == "tests":
            path = PurePosixPath(*path.parts[:2])
            is_folder = (ROOT / path).is_dir()
        else:
            is_folder = False
        if name.startswith(GENERATED):
            path, is_folder = PurePosixPath(GENERATED), True
        shown.update(f"{parent}/" for parent in path.parents if parent.parts)
        shown.add(f"{path}/" if is_folder else str(path))
    return {path for path in shown if not _unshown(PurePosixPath(path))}


def _unshown(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") and part != ".ci" for part in path.parts)
    return hidden or path.name in {"__init__.py", "__main__.py", "py.typed"}


def in_manual() -> set[str]:
    """The code block under `## Tree`: one entry per line, two spaces deeper per folder, `name  what it is`."""
    text = (ROOT / PAGE).read_text("utf-8")
    block = re.search(r"^## Tree\n.*?^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, f"{PAGE} has no code block under '## Tree'"
    shown: set[str] = set()
    folders: list[str] = []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        assert depth <= len(folders), f"{line!r} is indented deeper than a folder above it"
        del folders[depth:]
        path = "".join(folders) + name
        assert path not in shown, f"{PAGE} lists {path} twice"
        shown.add(path)
        if name.endswith("/"):
            folders.append(name)
    return shown


def test_the_manual_shows_the_tree() -> None:
    manual, disk = in_manual(), on_disk()
    missing, gone = sorted(disk - manual), sorted(manual - disk)
    assert not missing, f"missing from {PAGE}: {missing}"
    assert not gone, f"in {PAGE}, but not on disk: {gone}"
