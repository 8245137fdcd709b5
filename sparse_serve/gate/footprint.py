"""How much memory a served target takes: its processes at their peak, what it holds of the GPUs, its files.

A process's peak is Linux's `VmHWM`, the most of its memory that was resident at once. The sum over a server's processes
counts pages that they share once for each, so it is an upper bound of what the host needs. GPU memory is what all GPUs
held more than before the server was started: true where nothing else uses them meanwhile.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from maskgen.core.checkpoint import read_headers
from sparse_serve.gate.evidence import MemoryReading
from sparse_serve.runtime import processes

_PROC = Path("/proc")
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def tree(pid: int) -> set[psutil.Process]:
    """A process and all below it; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {psutil.Process(pid), *processes.descendants(pid)}
    return set()


def read(family: Iterable[psutil.Process], directory: Path | None, gpu_bytes: int | None) -> MemoryReading | None:
    """What these processes have taken so far; None where Linux does not tell. `directory` holds the weights."""
    peaks = [peak for process in family if (peak := _peak_bytes(process.pid)) is not None]
    if not peaks:
        return None
    return MemoryReading(len(peaks), sum(peaks), gpu_bytes, None if directory is None else weight_bytes(directory))


def weight_bytes(directory: Path) -> int:
    """Bytes of a model's files of weights."""
    return sum(path.stat().st_size for path in {header.path for header in read_headers(directory).values()})


def gpu_bytes() -> int | None:
    """Bytes in use on all GPUs, by whomever; None without GPUs, or without the library that asks the driver."""
    if not torch.cuda.is_available():
        return None
    try:
        return sum(torch.cuda.device_memory_used(device) for device in range(torch.cuda.device_count()))
    except (ImportError, RuntimeError):
        return None


def gpu_bytes_since(before: int | None) -> int | None:
    """What GPUs hold more than when `gpu_bytes` said `before`."""
    now = gpu_bytes()
    return None if before is None or now is None else max(now - before, 0)


def _peak_bytes(pid: int) -> int | None:
    try:
        found = _PEAK.search((_PROC / str(pid) / "status").read_text("utf-8"))
    except OSError:
        return None
    return int(found[1]) << 10 if found else None
