"""One process for each output: the second one is told who is there, and a killed one is in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maskgen.core.errors import OutputExistsError, StorageError
from maskgen.core.lock import exclusive

ROOT = Path(__file__).parents[3]
HOLD = """
import signal, sys, time
from pathlib import Path
from maskgen.core.lock import exclusive
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_another_process_holds_it_until_it_ends(end: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(OutputExistsError, match=rf"out: process {holder.pid} on \S+ is writing it; wait"),
        exclusive(out),
    ):
        pass
    holder.send_signal(end)
    holder.wait(30)
    holder.stdout.close()
    with exclusive(out):
        assert out.parent.is_dir()
    assert not list(tmp_path.rglob(".*.lock"))


def test_nothing_is_left_when_nothing_was_made(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with exclusive(tmp_path / "a" / "out"):
        (tmp_path / "a" / "out").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_a_lock_that_was_removed_between_opening_and_locking_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before removes its file when it is done; a lock on a file without a name protects nothing."""
    out, opened, real = tmp_path / "out", [], os.open

    def opening(path: Path, *options: int) -> int:
        descriptor = real(path, *options)
        opened.append(path)
        if len(opened) == 1:
            Path(path).unlink()
        return descriptor

    monkeypatch.setattr(os, "open", opening)
    with exclusive(out):
        monkeypatch.undo()
        assert len(opened) == 2
        with pytest.raises(OutputExistsError), exclusive(out):
            pass


def test_where_no_lock_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"), exclusive(tmp_path / "file" / "out"):
        pass
