"""Ends all child processes when a start is interrupted or the server is killed.

vLLM starts processes at several depths: engine, workers, a short-lived model inspector. While it is still starting
there is no handle to stop them with, so `descendants` asks the operating system for them.

A server that is killed cannot stop anything, and vLLM's engine process does not notice: it would stay, with the whole
model in memory. So the server calls `lead`, and each process below it calls `follow`, which ends it with the server:

    forked processes     call it by themselves, as `lead` asks Python for
    spawned processes    call it when they unpickle a `Follow`, which the server puts into vLLM's configuration
    others of vLLM's     call it when they load the plugin
    `sparse-serve serve` calls it first of all, for a benchmark that started it
    stock vLLM           `sparse-serve vllm` calls it, and takes along what vLLM has started, which does not know of it

Loading the plugin would be too late for the engine, which first waits five minutes for a server to answer it.

A Ctrl-C in a terminal goes to every process of its group. vLLM's engine would finish its requests and leave, and what
the server has not read by then is lost, as a server drops everything of an engine that has left. So spawned processes
leave the group: the server alone gets the signal, and ends the engine when all answers are out.
"""

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterable
from functools import cache

import psutil

from sparse_serve.runtime import environment

_THREAD = "follow-server"


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is there and has not ended; a zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> set[psutil.Process]:
    """All living processes below `pid`, at any depth. Empty if there is no such process."""
    try:
        return set(filter(is_alive, psutil.Process(pid).children(recursive=True)))
    except psutil.NoSuchProcess:
        return set()


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL each. Those already gone are fine, and psutil spares a new process that has got the id of one."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def reap() -> None:
    """Let go of children that have ended, for a program that has taken the place of the one which started them: nobody
    else waits for them, and their entries would stay. Not for a program with children of its own."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def lead() -> None:
    """Make the processes that are started from here on end when this one does."""
    environment.set_leader(os.getpid())
    _follow_after_fork()


def follow(takes_others: bool = False) -> None:
    """Make this process end, without ceremony, when the one that called `lead` does; at once if it is gone already.

    With `takes_others` it kills all processes below it before. Does nothing without a leader, or when called again.
    Starts a thread.
    """
    leader = environment.leader()
    if leader in (None, os.getpid()) or any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    try:
        handle = os.pidfd_open(leader)
        is_another = psutil.Process(leader).create_time() > psutil.Process().create_time()
    except (ProcessLookupError, psutil.NoSuchProcess):
        os._exit(1)
    except OSError:
        return  # a kernel or sandbox without such handles: the engine still ends with a server that is asked to end
    if is_another:  # a leader is older than its followers; this process only has got its id
        os._exit(1)
    threading.Thread(target=_end_with, args=(handle, takes_others), name=_THREAD, daemon=True).start()


class Follow:
    """Put into what is sent to a spawned process, this makes it `follow`, in a group of its own: unpickling it does."""

    def __reduce__(self) -> tuple[Callable[[], "Follow"], tuple[()]]:
        return _follow_when_unpickled, ()


def _follow_when_unpickled() -> Follow:
    follow()
    if environment.leader() not in (None, os.getpid()) and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    return Follow()


@cache
def _follow_after_fork() -> None:
    os.register_at_fork(after_in_child=follow)


def _end_with(handle: int, takes_others: bool) -> None:
    """`handle` becomes readable when its process has ended."""
    ended = select.poll()
    ended.register(handle, select.POLLIN)
    ended.poll()
    while takes_others and (others := descendants(os.getpid())):
        kill(others)
    os._exit(1)
