"""The rules that keep the code base small and its arrows pointing one way. A failure names the file and the rule."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pytest

from tests.architecture.layers import FENCED, LEVELS
from tests.architecture.source import GENERATED, PACKAGES, ROOT, files, imports, module_name, python_files, tree

CORE_MAY_IMPORT = {"torch", "safetensors", "numpy"}
RUNS_CODE_FROM_DATA = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

FILE_LINES, FUNCTION_LINES, MEDIAN_FUNCTION_LINES = 300, 60, 25
EVERY_FILE = python_files(*PACKAGES)


def level(module: str) -> int:
    """The level of one of our modules; an exact name goes before a pattern."""
    if module in LEVELS:
        return LEVELS[module]
    found = [LEVELS[pattern] for pattern in LEVELS if fnmatchcase(module, pattern)]
    assert found, f"{module} has no level; give it one in LEVELS of layers.py"
    return found[0]


def is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def test_the_files_are_found() -> None:
    assert {"maskgen/core/pattern.py", "sparse_serve/server/settings.py"} <= set(EVERY_FILE)


def test_no_level_is_for_a_module_that_is_gone() -> None:
    modules = {module_name(path) for path in python_files(*PACKAGES)} | {
        "sparse_serve.api.pb",
        "sparse_serve.api.pb.v1",
    }
    stale = [name for name in LEVELS if not any(fnmatchcase(module, name) for module in modules)]
    assert not stale


@pytest.mark.parametrize("path", EVERY_FILE)
def test_imports_go_down(path: str) -> None:
    module = module_name(path)
    here = level(module)
    wrong = [name for name in imports(path) if is_ours(name) and name != module and level(name) >= here]
    in_core = module.startswith("maskgen.core.")
    assert not [name for name in wrong if not (in_core and name.startswith("maskgen.core."))]


@pytest.mark.parametrize("path", EVERY_FILE)
def test_packages_meet_in_core_only(path: str) -> None:
    module = module_name(path)
    for name in filter(is_ours, imports(path)):
        if module.startswith("maskgen"):
            assert name.startswith("maskgen"), f"{path} imports {name}: maskgen never imports sparse_serve"
        elif name.startswith("maskgen"):
            assert name.startswith("maskgen.core"), f"{path} imports {name}: sparse_serve sees maskgen.core only"


@pytest.mark.parametrize("path", python_files("maskgen/methods"))
def test_methods_see_tensors_only(path: str) -> None:
    seen = {name for name in imports(path) if is_ours(name)}
    contracts = {"maskgen.methods", "maskgen.methods.learned"}
    assert all(name in contracts or name.startswith(("maskgen.core", "maskgen.numerics")) for name in seen), seen


@pytest.mark.parametrize("path", python_files("maskgen/core"))
def test_core_stands_alone(path: str) -> None:
    allowed = CORE_MAY_IMPORT | sys.stdlib_module_names
    wrong = {name for name in imports(path) if name.split(".")[0] not in allowed}
    assert not {name for name in wrong if not name.startswith("maskgen.core")}


@pytest.mark.parametrize("package", FENCED)
def test_big_dependencies_stay_behind_their_fence(package: str) -> None:
    users = {
        module_name(path)
        for path in EVERY_FILE
        if any(name.split(".")[0].split("_")[0] == package for name in imports(path))
    }
    assert users <= FENCED[package], f"only {sorted(FENCED[package])} may import {package}"
    assert users, f"nothing imports {package}: the fence is out of date"


@pytest.mark.parametrize("path", EVERY_FILE)
def test_data_is_never_run(path: str) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & RUNS_CODE_FROM_DATA
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "__import__", "torch.load"}, f"{path}:{node.lineno}: {called}"
        if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
            assert ast.unparse(node.value) == "False", f"{path}:{node.lineno}: {node.arg}"


def functions(path: str) -> dict[str, int]:
    """Lines of each function, by place."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    return {f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1 for node in found if node.end_lineno}


@pytest.mark.parametrize("path", python_files(*PACKAGES, "proto", "tests"))
def test_a_file_fits_the_budget(path: str) -> None:
    lines = len((ROOT / path).read_text("utf-8").splitlines())
    assert lines <= FILE_LINES, f"{path}: {lines} lines; split it"
    assert not {name: size for name, size in functions(path).items() if size > FUNCTION_LINES}


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short_as_a_rule(package: str) -> None:
    sizes = [size for path in python_files(package) for size in functions(path).values()]
    assert statistics.median(sizes) <= MEDIAN_FUNCTION_LINES


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
        "import sys, time; began = time.perf_counter(); "
        f"import {package}; took_s = time.perf_counter() - began; "
        "heavy = {'torch', 'vllm', 'transformers', 'grpc', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; assert took_s < 1, took_s"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def on_disk() -> set[str]:
    """What the README's tree must show; folders end in a slash.

    Every file of the packages, `proto/`, `deploy/` and the top, but package markers, hidden files, generated code and
    what is below the first level of `tests/`.
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


def in_readme() -> set[str]:
    """The code block under `## Tree`: one entry per line, two spaces deeper per folder, `name  what it is`."""
    text = (ROOT / "README.md").read_text("utf-8")
    block = re.search(r"^## Tree\n.*?^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no code block under '## Tree'"
    shown: set[str] = set()
    folders: list[str] = []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        assert depth <= len(folders), f"{line!r} is indented deeper than a folder above it"
        del folders[depth:]
        shown.add("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return shown


def test_the_readme_shows_the_tree() -> None:
    readme, disk = in_readme(), on_disk()
    missing, gone = sorted(disk - readme), sorted(readme - disk)
    assert not missing, f"missing from README.md: {missing}"
    assert not gone, f"in README.md, but not on disk: {gone}"
