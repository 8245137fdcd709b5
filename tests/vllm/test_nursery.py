"""The nursery's own promise: a test that hangs leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.vllm import nursery
from tests.vllm.serving import is_alive, until


def test_a_child_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def hang() -> int:
        started.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
        return 0

    def limit(number: int, frame: object) -> None:
        until(started.exists)
        pytest.fail("the time limit")

    before = signal.signal(signal.SIGALRM, limit)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(pytest.fail.Exception, match="the time limit"):
            nursery.fork(hang)
    finally:
        signal.signal(signal.SIGALRM, before)
    until(lambda: started.read_text() and not is_alive(int(started.read_text())))
