"""Which folders of compiled code stay. Processes with locks are real ones; no model is compiled."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_serve.plugin import kept_code

HOLD = """
import sys
from pathlib import Path
from sparse_serve.plugin import kept_code
kept_code.use(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept_code, "KEPT", 2)
    monkeypatch.setattr(kept_code, "_held", {})
    return tmp_path / "torch_aot_compile"


def started(folder: Path, at_s: int) -> None:
    """As a process that has ended leaves a folder: with code in it, last used at a time."""
    (folder / "rank_0_0").mkdir(parents=True)
    (folder / "rank_0_0/model").write_text("code")
    (folder / kept_code.OURS).touch()
    os.utime(folder / kept_code.OURS, (at_s, at_s))


def test_the_newest_stay_and_what_is_not_ours(root: Path) -> None:
    for at_s, name in enumerate(("c", "a", "d", "b"), 1):
        started(root / name, at_s)
    (root / "stock/rank_0_0").mkdir(parents=True)
    kept_code.use(root / "new")
    assert {folder.name for folder in root.iterdir()} == {"stock", "b", "new"}
    assert (root / "b/rank_0_0/model").read_text() == "code"


def test_a_folder_that_is_used_again_is_a_new_one(root: Path) -> None:
    for at_s, name in enumerate(("a", "b", "c"), 1):
        started(root / name, at_s)
    kept_code.use(root / "a")
    kept_code.use(root / "a")
    assert {folder.name for folder in root.iterdir()} == {"a", "c"}


def test_a_folder_in_use_stays_until_its_process_ends(root: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(root / "old")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        os.utime(root / "old" / kept_code.OURS, (1, 1))
        for at_s, name in enumerate(("a", "b", "c"), 2):
            started(root / name, at_s)
        kept_code.use(root / "new")
        assert {folder.name for folder in root.iterdir()} == {"old", "c", "new"}
        process.communicate()
    kept_code.use(root / "newer")
    assert {folder.name for folder in root.iterdir()} == {"new", "newer"}


def test_a_folder_that_was_removed_while_its_lock_was_waited_for_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, []

    def removing(descriptor: int, how: int) -> None:
        if not removed:
            removed.append((root / "new" / kept_code.OURS).unlink())
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removing)
    kept_code.use(root / "new")
    assert removed and (root / "new" / kept_code.OURS).is_file()
