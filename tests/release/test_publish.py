"""What a release refuses, and the texts it makes."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy.release import publish
from tests.architecture.source import ROOT

CHANGELOG = """# Changelog

## [Unreleased]

### Added
- Something.

## [0.1.0] - 2026-01-02

### Added
- All.
"""
DAY = datetime.date(2026, 3, 4)


def test_sections_end_where_the_next_begins() -> None:
    found = publish.sections(CHANGELOG)
    assert found == {"Unreleased": "### Added\n- Something.", "0.1.0": "### Added\n- All."}


def test_what_is_unreleased_becomes_a_section() -> None:
    text = publish.with_section(CHANGELOG, "0.2.0", DAY)
    assert "## [0.2.0] - 2026-03-04\n" in text
    assert publish.sections(text) == {
        "Unreleased": "",
        "0.2.0": "### Added\n- Something.",
        "0.1.0": "### Added\n- All.",
    }
    with pytest.raises(SystemExit, match="nothing to release"):
        publish.with_section(text, "0.3.0", DAY)


@pytest.mark.parametrize(
    ("version", "problem"), [("0.1.0", "already"), ("", "expected X.Y.Z"), ("v1", "expected X.Y.Z")]
)
def test_a_version_that_cannot_be_is_refused(version: str, problem: str) -> None:
    with pytest.raises(SystemExit, match=problem):
        publish.with_section(CHANGELOG, version, DAY)


def test_only_a_clean_tree_with_a_section_is_a_release() -> None:
    assert publish.unready("", CHANGELOG, "0.1.0") == ""
    assert "no section [0.2.0]" in publish.unready("", CHANGELOG, "0.2.0")
    dirty = publish.unready(" M a.py\n?? b.py\n", CHANGELOG, "0.1.0")
    assert "not clean (a.py, b.py)" in dirty


class Repository:
    """One of git, of version 0.1.0; nothing is committed yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
        (root / "CHANGELOG.md").write_text(CHANGELOG)
        self("init")
        self("add", ".")

    def __call__(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True).stdout.decode()


@pytest.fixture
def git(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Whoever runs the tests may sign commits, with a key that asks for a word."""
    settings = tmp_path_factory.mktemp("home") / "gitconfig"
    settings.write_text('[commit]\ngpgsign = true\n[gpg]\nprogram = "false"\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    return Repository(tmp_path)


def test_a_version_is_committed_in_a_clean_tree_only(git: Repository, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"not clean \(CHANGELOG.md, pyproject.toml\)"):
        publish.begin("0.2.0", True, tmp_path)
    git("commit", "--message", "all")
    publish.begin("0.2.0", True, tmp_path)
    assert git("log", "-1", "--format=%s").strip() == "0.2.0"
    assert git("status", "--porcelain") == ""
    assert publish.sections((tmp_path / "CHANGELOG.md").read_text())["0.2.0"] == "### Added\n- Something."
    assert 'version = "0.2.0"' in (tmp_path / "pyproject.toml").read_text()


def test_a_commit_that_git_refuses_leaves_the_tree_as_it_was(
    git: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git("commit", "--message", "all")
    with monkeypatch.context() as nobody:
        nobody.setenv("GIT_COMMITTER_NAME", "")
        with pytest.raises(SystemExit, match=r"error: git commit: .*empty ident name"):
            publish.begin("0.2.0", True, tmp_path)
    assert git("status", "--porcelain") == ""
    publish.begin("0.2.0", True, tmp_path)
    assert git("log", "-1", "--format=%s") == "0.2.0\n"


def test_a_version_whose_release_failed_is_taken_back(git: Repository, tmp_path: Path) -> None:
    git("commit", "--message", "all")
    before = git("rev-parse", "HEAD")
    publish.begin("0.2.0", True, tmp_path)
    made = git("rev-parse", "HEAD").strip()
    (tmp_path / "notes").write_text("of somebody else")
    publish.undo(made, tmp_path)
    assert git("rev-parse", "HEAD") == before
    assert (tmp_path / "CHANGELOG.md").read_text() == CHANGELOG
    assert git("status", "--porcelain") == "?? notes\n"
    publish.begin("0.2.0", False, tmp_path)
    git("commit", "--all", "--message", "later")
    with pytest.raises(SystemExit, match="is not the last commit any more, and stays"):
        publish.undo(made, tmp_path)
    assert git("log", "-1", "--format=%s") == "later\n"


STAND_IN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*words[:3], file=log)
if os.environ.get("FAILS") in words[1:3]:
    sys.exit(1)
if words[0].endswith("publish.py") and words[1] in ("version", "undo"):
    sys.exit(subprocess.run([sys.executable, *words]).returncode)
"""
"""In the place of the environment's Python: writes down what it is asked for, and makes nothing but the commits."""


class Release:
    """`make release` where the environment is a stand-in."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log"

    def __call__(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "EXTRA=cpu", "VENV=stand-in", *words]
        environ = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"} | environ
        return subprocess.run(
            command, cwd=self.root, env=environ, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture
def release(git: Repository, tmp_path: Path) -> Release:
    made, stand_in = Release(tmp_path), tmp_path / "stand-in/bin/python"
    for name in ("Makefile", "setup.py", "deploy/release/publish.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "deploy/locks").mkdir()
    for name in ("cpu", "demo", "tools", "release"):
        (tmp_path / f"deploy/locks/{name}.txt").write_text("torch==1\n")
    (tmp_path / ".gitignore").write_text("stand-in\nlog\n")
    git("add", ".")
    git("commit", "--message", "all")
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(STAND_IN.format(log=str(made.log), python=sys.executable))
    stand_in.chmod(0o755)
    return made


@pytest.mark.parametrize("fails", ["ready", "tests.release.wheel", "bundle", "nothing"])
def test_a_release_leaves_its_commit_only_if_all_of_it_ends_well(fails: str, git: Repository, release: Release) -> None:
    before = git("rev-parse", "HEAD")
    ran = release("release", "VERSION=0.2.0", FAILS=fails)
    assert (ran.returncode == 0) == (fails == "nothing"), ran.stderr
    assert (git("rev-parse", "HEAD") == before) == (fails != "nothing")
    assert git("status", "--porcelain") == ""
    assert ("undo" in release.log.read_text()) == (fails != "nothing")


@pytest.mark.parametrize("verb", ["release", "version"])
def test_a_version_of_the_environment_is_not_taken(verb: str, git: Repository, release: Release) -> None:
    before = git("rev-parse", "HEAD")
    ran = release(verb, VERSION="0.2.0")
    assert ran.returncode == 2
    assert f"VERSION=0.2.0 comes from the environment; unset it, or say it: make {verb} VERSION=0.2.0" in ran.stderr
    assert git("rev-parse", "HEAD") == before and git("status", "--porcelain") == ""


def test_the_version_is_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    changed = publish.with_version(project, "9.8.7")
    assert tomllib.loads(changed)["project"]["version"] == "9.8.7"
    assert len([line for line, new in zip(project.splitlines(), changed.splitlines(), strict=True) if line != new]) == 1
    version = publish.current_version()
    found = subprocess.run(
        ["git", "grep", "-lF", f'"{version}"', "--", "*.py", "*.toml"], cwd=ROOT, capture_output=True
    )
    assert [name for name in found.stdout.decode().split() if not name.startswith("tests/")] == ["pyproject.toml"]


def test_the_changelog_is_one_that_can_be_released() -> None:
    assert publish.sections((ROOT / "CHANGELOG.md").read_text("utf-8"))


def test_the_bill_of_materials_has_the_lock(tmp_path: Path) -> None:
    listed = {"components": [{"name": "Some.Package", "version": "1.0"}, {"name": "torch", "version": "2.13.0+cpu"}]}
    publish.check_materials(listed, "# comment\nsome_package==1.0\ntorch==2.13.0+cpu\nold==1; python_version < '3'\n")
    with pytest.raises(SystemExit, match=r"lacks.*torch"):
        publish.check_materials(listed, "torch==2.14.0+cpu\n")


def test_the_steps_are_a_command() -> None:
    command = [sys.executable, "deploy/release/publish.py", "version", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "expected X.Y.Z" in done.stderr) == (1, True)
