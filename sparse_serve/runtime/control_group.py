"""What the control group of this process leaves of the memory: the limit of a container, a pod or a systemd unit.

Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. On other systems there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_OWN = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Files:
    """Names of a version: the folder below the mount, and in it the limit, what is used of it, and the lines of
    `memory.stat` with cached pages of files, with the share that can be had back: the kernel gives up those first that
    were read once, and of the others half is left to whoever reads them."""

    folder: str
    limit: str
    used: str
    cached: Mapping[str, float]


_V2 = _Files("", "memory.max", "memory.current", {"inactive_file": 1.0, "active_file": 0.5})
_V1 = _Files(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", {"total_inactive_file": 1.0, "total_active_file": 0.5}
)


def free_bytes() -> int | None:
    """The least that is left in the control group of this process and those around it; None if none has a limit.

    Cached pages of files count as free, half of those that were read more than once, much as in what Linux calls
    available.
    """
    left = [free for line in _read(_OWN).splitlines() for free in _left(line)]
    return min(left, default=None)


def _left(line: str) -> Iterator[int]:
    """What is left in each of the groups that a line of /proc/self/cgroup is about."""
    number, _, rest = line.partition(":")
    controllers, _, group = rest.partition(":")
    if number == "0" and not controllers:
        files = _V2
    elif "memory" in controllers.split(","):
        files = _V1
    else:
        return
    # A container sees its own group as the root of the mount, even where the path is still the host's.
    parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
    for depth in range(len(parts) + 1):
        folder = _MOUNT.joinpath(files.folder, *parts[:depth])
        limit, used = _read(folder / files.limit).strip(), _read(folder / files.used).strip()
        if limit.isdecimal() and used.isdecimal():
            yield max(0, int(limit) - int(used) + _cached_bytes(folder, files))


def _cached_bytes(folder: Path, files: _Files) -> int:
    found = 0.0
    for line in _read(folder / "memory.stat").splitlines():
        name, _, count = line.partition(" ")
        if name in files.cached and count.strip().isdecimal():
            found += files.cached[name] * int(count)
    return int(found)


def _read(file: Path) -> str:
    """The text of a file of the kernel; empty where it is not there or not readable."""
    try:
        return file.read_text("utf-8")
    except OSError:
        return ""
