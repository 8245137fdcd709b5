"""Peak memory of this process, and chunk sizes for work on large tensors."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

ELEMENTS = {"cpu": 1 << 18}
"""Elements per chunk by kind of device. On a CPU, what stays in a core's cache."""

ELEMENTS_DEFAULT = 1 << 25
"""Elements per chunk on any other device: enough to keep an accelerator busy."""


def chunk_elements(device: torch.device) -> int:
    """How many elements to work on at a time on `device`, where temporaries of a whole tensor would take too much."""
    return ELEMENTS.get(device.type, ELEMENTS_DEFAULT)


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    On Linux it is read from /proc: `getrusage` would count the parent's memory before this process was started, too.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes of tensors on a GPU so far; on a CPU, where torch does not count them, `peak_rss_bytes`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
