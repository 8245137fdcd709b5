"""No process is left behind: not when a start is interrupted, not when the server itself is killed.

vLLM starts processes at several depths (engine, workers, a short-lived model inspector). While it is still starting
there is no handle to stop them with, so `descendants` asks the operating system. And vLLM's engine process does not
notice that its server is gone; it would stay, with the whole model in memory. So the server leaves its process id in
the environment (`lead`), and every one of those processes calls `follow` as early as our code runs in it: when it is
forked, or when it imports the server's main module (`sparse_serve.cli.main`), else when vLLM loads its plugins, which
an engine whose server died during their handshake does not do for five minutes.
"""

import contextlib
import os
import select
import signal
import threading
from pathlib import Path

_LEADER = "_SPARSE_SERVE_PID"
_THREAD = "follow-server"


def descendants(pid: int) -> set[int]:
    """Ids of all living processes below `pid`, at any depth; without zombies."""
    parents = dict(filter(None, map(_parent, Path("/proc").glob("[0-9]*"))))
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


def kill(pids: set[int]) -> None:
    """SIGKILL each; those already gone are fine."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lead() -> None:
    """Make the vLLM processes started from here on end when this process does."""
    os.environ[_LEADER] = str(os.getpid())
    os.register_at_fork(after_in_child=follow)


def follow() -> None:
    """End this process, without ceremony, when the one that called `lead` is gone. Nothing if there is none.

    A second call changes nothing.
    """
    leader = int(os.environ.get(_LEADER, "0"))
    if leader in (0, os.getpid()) or any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    try:
        handle = os.pidfd_open(leader)
    except ProcessLookupError:
        os._exit(1)
    except OSError:
        return  # a kernel or sandbox without such handles: the engine still ends with a server that is asked to end
    threading.Thread(target=_end_with, args=(handle,), name=_THREAD, daemon=True).start()


def _end_with(handle: int) -> None:
    """`handle` becomes readable when its process has ended."""
    ended = select.poll()
    ended.register(handle, select.POLLIN)
    ended.poll()
    os._exit(1)


def _parent(entry: Path) -> tuple[int, int] | None:
    try:
        # "pid (name) state parent ...", where the name may hold spaces and parentheses
        state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else (int(entry.name), int(parent))
