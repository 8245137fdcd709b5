"""What a served model holds of the host's memory, and what its processes compute while nobody asks.

Counted are the pages that are a process's own or shared with others of the same server, and those of the files in the
model's folder, which llama.cpp maps; a page that several processes have is divided among them. Pages of libraries are
not counted unless a process has changed them: they are shared with whatever else runs here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

from sparse_serve.gate.footprint import tree

_PROC = Path("/proc")
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$")
_SHARED = ("/dev/shm/", "/dev/zero", "/memfd:", "/SYSV", "[")
"""What names of mappings begin with that are no file on a disk."""


def resident_bytes(pid: int, model: Path) -> int | None:
    """Of the server with this process, all processes below it included; None where Linux does not tell."""
    found = [size for process in tree(pid) if (size := _of_process(process.pid, model)) is not None]
    return sum(found) if found else None


def _of_process(pid: int, model: Path) -> int | None:
    try:
        text = (_PROC / str(pid) / "smaps").read_text("utf-8", "replace")
    except OSError:
        return None
    return counted(text, model)


def counted(smaps: str, model: Path) -> int:
    """Bytes that a process's `smaps` (proc(5)) says are to be counted; `model` is a folder or a file."""
    folder = str(model.resolve())
    total_kib, field = 0, "Pss"
    for line in smaps.splitlines():
        if mapping := _MAPPING.match(line):
            name = mapping[1]
            is_own = not name or name.startswith(_SHARED) or name == folder or name.startswith(f"{folder}/")
            field = "Pss" if is_own else "Anonymous"
        elif line.startswith(f"{field}:"):
            total_kib += int(line.split()[1])
    return total_kib << 10


def processor_s(pids: Iterable[int]) -> float:
    """Seconds of processor time that these servers' processes have used so far."""
    total = 0.0
    for process in (process for pid in pids for process in tree(pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
