"""Child processes: found at any depth, and gone when their leader is."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import pytest

from sparse_serve.runtime import processes


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_descendants_are_found_at_any_depth_and_killed() -> None:
    before = processes.descendants(os.getpid())
    inner = "import time; time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        until(lambda: len(processes.descendants(os.getpid()) - before) == 2)
        found = processes.descendants(os.getpid()) - before
        (outer,) = [process for process in found if process.pid == child.pid]
        assert processes.descendants(child.pid) == found - {outer}
        processes.kill(found)
        processes.kill(found)
    assert child.returncode == -signal.SIGKILL
    until(lambda: processes.descendants(os.getpid()) == before)


FOLLOWER = (
    "from sparse_serve.runtime import processes; processes.follow(); "
    "print('up', flush=True); import time; time.sleep(60)"
)


def test_a_follower_ends_when_its_leader_is_killed() -> None:
    leader = (
        "import subprocess, sys; from sparse_serve.runtime import processes; processes.lead()\n"
        f"subprocess.run([sys.executable, '-c', {FOLLOWER!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", leader], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        (follower,) = processes.descendants(child.pid)
        child.kill()
        child.wait()
        assert child.stdout.read() == b"", "the follower still holds the pipe"
        until(lambda: not processes.is_alive(follower))


def test_a_forked_process_follows_by_itself_and_only_once() -> None:
    code = (
        "import os, threading; from sparse_serve.runtime import processes; processes.lead()\n"
        "if os.fork() == 0: processes.follow(); os._exit(threading.active_count())\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 2


def test_a_follower_of_a_leader_already_gone_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    run = subprocess.run([sys.executable, "-c", FOLLOWER], env=os.environ | {"_SPARSE_SERVE_LEADER": str(gone.pid)})
    assert run.returncode == 1


def test_a_younger_process_with_the_leaders_id_is_not_the_leader() -> None:
    """The id was given to another after the leader had ended: here, to a child of the follower's."""
    code = (
        "import os, subprocess, sys, time; from sparse_serve.runtime import environment, processes\n"
        "time.sleep(0.05)  # the system counts time in hundredths of a second\n"
        "other = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "environment.set_leader(other.pid); processes.follow()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 1


def test_a_spawned_process_follows_when_it_is_sent_a_follow() -> None:
    leader = (
        "import multiprocessing, threading, time\n"
        "from sparse_serve.runtime import processes\n"
        "def child(settings, pipe):\n"
        "    pipe.send([thread.name for thread in threading.enumerate()]); time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    processes.lead()\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    ours, theirs = context.Pipe()\n"
        "    context.Process(target=child, args=({'follow': processes.Follow()}, theirs)).start()\n"
        "    print('follow-server' in ours.recv(), flush=True); time.sleep(60)\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(leader)
        file.flush()
        with subprocess.Popen([sys.executable, file.name], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"True\n"
            family = processes.descendants(child.pid)
            groups = {os.getpgid(process.pid) for process in family}
            child.kill()
        assert groups - {os.getpgrp()} == groups & {process.pid for process in family}, "one has left the group"
        assert len(groups) == 2
        assert len(family) == 2, "the child, and Python's tracker of resources"
        until(lambda: not any(map(processes.is_alive, family)))


@pytest.mark.parametrize("leader", [None, "self"])
def test_without_a_leader_nothing_happens(leader: str | None) -> None:
    code = (
        "from sparse_serve.runtime import processes; "
        + ("processes.lead(); " if leader else "")
        + ("processes.follow(); import threading; assert threading.active_count() == 1")
    )
    environ = {name: value for name, value in os.environ.items() if name != "_SPARSE_SERVE_LEADER"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)


def test_a_program_lets_go_of_what_the_one_before_it_left() -> None:
    """As `--restarts` does: multiprocessing's tracker ends with the program that started it; nobody waits for it."""
    second = (
        "import os, psutil, time; from sparse_serve.runtime import processes\n"
        "def left(): return [child.status() for child in psutil.Process().children()]\n"
        "while left() != ['zombie']: time.sleep(0.01)\n"
        "processes.reap(); processes.reap(); print(left())"
    )
    first = (
        "import multiprocessing, os, sys; multiprocessing.get_context('spawn').Semaphore()\n"
        f"os.execv(sys.executable, [sys.executable, '-c', {second!r}])"
    )
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
