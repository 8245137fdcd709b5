"""What a release refuses, and the texts it makes."""

from __future__ import annotations

import datetime
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


def test_a_version_is_committed_in_a_clean_tree_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True).stdout.decode()

    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git("init")
    for key, value in (("user.name", "a"), ("user.email", "a@example.com")):
        git("config", key, value)
    git("add", ".")
    with pytest.raises(SystemExit, match=r"not clean \(CHANGELOG.md, pyproject.toml\)"):
        publish.begin("0.2.0", True, tmp_path)
    git("commit", "--message", "all")
    publish.begin("0.2.0", True, tmp_path)
    assert git("log", "-1", "--format=%s").strip() == "0.2.0"
    assert git("status", "--porcelain") == ""
    assert publish.sections((tmp_path / "CHANGELOG.md").read_text())["0.2.0"] == "### Added\n- Something."
    assert 'version = "0.2.0"' in (tmp_path / "pyproject.toml").read_text()


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
