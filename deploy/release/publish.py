"""The steps of a release that are not building: `make version`, `make release`.

    version X.Y.Z     the one version in pyproject.toml, and a section of CHANGELOG.md made of what is unreleased;
                      with --commit, in a clean tree, committed
    undo COMMIT       take that commit back, if nothing came after it: what was released of it did not pass its checks
    ready             may this tree be released? clean, and with a section of its version
    bundle PYTHON     beside the wheel: notes, the lock, the bill of materials of an environment, digests

`make release VERSION=X.Y.Z` does all of it, and leaves the commit of its version only if all of it ends well. Nothing
is uploaded or tagged.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT, CHANGELOG = ROOT / "pyproject.toml", ROOT / "CHANGELOG.md"
UNRELEASED = "## [Unreleased]"
SPEC_VERSION = "1.6"
"""Of CycloneDX."""

_VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
_SECTION = re.compile(r"^## \[(.+?)\].*\n", re.MULTILINE)


def sections(changelog: str) -> dict[str, str]:
    """The text of each section, by its version."""
    heads = list(_SECTION.finditer(changelog))
    ends = [head.start() for head in heads[1:]] + [len(changelog)]
    return {head[1]: changelog[head.end() : end].strip() for head, end in zip(heads, ends, strict=True)}


def with_section(changelog: str, version: str, day: datetime.date) -> str:
    """What is unreleased, as the section of a version. Raises `SystemExit` where that cannot be."""
    if _VERSION.fullmatch(version) is None:
        raise SystemExit(f"error: VERSION is {version!r}; expected X.Y.Z, or X.Y.Z with a, b or rc and a number")
    found = sections(changelog)
    if version in found:
        raise SystemExit(
            f"error: CHANGELOG.md has a section [{version}] already; if that is what is to be released, make release "
            "without VERSION"
        )
    if not found.get("Unreleased"):
        raise SystemExit(f"error: CHANGELOG.md has nothing under {UNRELEASED}: there is nothing to release")
    return changelog.replace(UNRELEASED, f"{UNRELEASED}\n\n## [{version}] - {day.isoformat()}", 1)


def with_version(project: str, version: str) -> str:
    """pyproject.toml with another version."""
    return re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', project, count=1)


def current_version() -> str:
    """The version of pyproject.toml, which is the only place that has it."""
    return str(tomllib.loads(PROJECT.read_text("utf-8"))["project"]["version"])


def unready(status: str, changelog: str, version: str) -> str:
    """Why this is no release, in one line; "" if it is one. `status` is what `git status --porcelain` says."""
    if status:
        return unclean(status)
    if not sections(changelog).get(version):
        return f"CHANGELOG.md has no section [{version}]; make release VERSION={version} writes and commits it"
    return ""


def unclean(status: str) -> str:
    """What `git status --porcelain` says, in one line; "" of a clean tree."""
    changed = [line[3:] for line in status.splitlines()]
    more = ", ..." if len(changed) > 3 else ""
    return f"the tree is not clean ({', '.join(changed[:3])}{more}); commit first" if changed else ""


def begin(version: str, commits: bool, root: Path = ROOT) -> None:
    """Write a version and its section of the changelog. Raises `SystemExit` where that cannot be.

    With `commits` the tree has to be clean before, and both files are committed, or are as they were if git refuses.
    """
    project, changelog = root / PROJECT.name, root / CHANGELOG.name
    if commits and (reason := unclean(_git(root, "status", "--porcelain"))):
        raise SystemExit(f"error: {reason}")
    section = with_section(changelog.read_text("utf-8"), version, datetime.date.today())
    changelog.write_text(section, "utf-8")
    before = project.read_text("utf-8")
    if with_version(before, version) != before:  # else make would take the file for new, and install all of it again
        project.write_text(with_version(before, version), "utf-8")
    if not commits:
        return
    files = ("--", project.name, changelog.name)
    try:
        _git(root, "commit", "--quiet", "--message", version, *files)
    except SystemExit:
        _git(root, "checkout", "--quiet", "HEAD", *files)
        raise


def undo(commit: str, root: Path = ROOT) -> None:
    """Take a commit that `begin` made back; changes in other files stay. Raises `SystemExit` if others came after."""
    if _git(root, "rev-parse", "HEAD").strip() != commit:
        raise SystemExit(f"error: {commit[:12]} is not the last commit any more, and stays; git revert takes it back")
    _git(root, "reset", "--quiet", "--keep", "HEAD~1")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: git {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def bundle(python: Path, out: Path) -> list[Path]:
    """Write what belongs to a wheel and an sdist in `out`. Returns all files there."""
    version = current_version()
    stem = f"sparse-serve-{version}"
    (out / f"{stem}-notes.md").write_text(sections(CHANGELOG.read_text("utf-8"))[version] + "\n", "utf-8")
    shutil.copyfile(ROOT / "deploy/locks/cpu.txt", out / f"{stem}-cpu.txt")
    materials = out / f"{stem}.cdx.json"
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(PROJECT), "--mc-type", "library"]
    command += [
        "--output-reproducible",
        "--spec-version",
        SPEC_VERSION,
        "--of",
        "JSON",
        "-o",
        str(materials),
        str(python),
    ]
    subprocess.run(command, check=True)
    check_materials(json.loads(materials.read_text("utf-8")), (ROOT / "deploy/locks/cpu.txt").read_text("utf-8"))
    digests = out / f"{stem}-sha256.txt"
    digests.unlink(missing_ok=True)
    files = sorted(file for file in out.iterdir() if file.is_file())
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    digests.write_text("".join(lines), "utf-8")
    return [*files, digests]


def check_materials(materials: dict[str, Any], lock: str) -> None:
    """Raise `SystemExit` if the bill of materials lacks a package of the lock in its version."""
    listed = {(canonicalize_name(each["name"]), each.get("version")) for each in materials["components"]}
    pins = [Requirement(line) for line in lock.splitlines() if line and not line.startswith("#")]
    wanted = {
        (canonicalize_name(pin.name), str(pin.specifier).removeprefix("=="))
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }
    if lacking := sorted(wanted - listed):
        raise SystemExit(f"error: the bill of materials lacks {lacking[:5]}, which the lock has")


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description="Steps of a release.")
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("version")
    first.add_argument("version")
    first.add_argument("--commit", action="store_true")
    steps.add_parser("undo").add_argument("commit")
    steps.add_parser("ready")
    last = steps.add_parser("bundle")
    last.add_argument("python", type=Path)
    last.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    if args.step == "version":
        begin(args.version, args.commit)
        then = "committed" if args.commit else "look at them, commit, make release"
        print(f"pyproject.toml and CHANGELOG.md are those of {args.version}; {then}")
    elif args.step == "undo":
        undo(args.commit)
        print("the commit of the version is taken back")
    elif args.step == "ready":
        status = _git(ROOT, "status", "--porcelain")
        if reason := unready(status, CHANGELOG.read_text("utf-8"), current_version()):
            raise SystemExit(f"error: this is no release: {reason}")
    else:
        for file in bundle(args.python, args.out.resolve()):
            print(file)


if __name__ == "__main__":
    main()
