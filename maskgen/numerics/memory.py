"""How much memory this process has used at most, of the host or of the device it works on."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far. On Linux not by `getrusage`, which counts in who started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes of tensors so far on a GPU; on a CPU, where tensors are not told apart, `peak_rss_bytes`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
