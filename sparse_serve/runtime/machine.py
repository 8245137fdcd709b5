"""Facts of the machine: cores, memory, processor, GPU, and the versions of what is installed.

The processor's facts come from Linux's own list. py-cpuinfo would read other systems too, but takes two seconds and
starts several processes, one of which runs machine code of its own: too much for every start of a server. Where that
list is missing, only what `platform` knows is told.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path

from sparse_serve.runtime import control_group

_CPUINFO = Path("/proc/cpuinfo")
_VECTOR_FLAGS = ("avx", "amx", "fma", "f16c")


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_bytes() -> int:
    """Memory that can be had now without swapping: of the host, by everybody together, and within our limit."""
    import psutil  # not at the top: kernels are tested and timed on GPU machines that have torch and little else

    host_bytes, group_bytes = int(psutil.virtual_memory().available), control_group.free_bytes()
    return host_bytes if group_bytes is None else min(host_bytes, group_bytes)


def is_writable(folder: Path) -> bool:
    """Whether files can be made in it, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def version(package: str) -> str | None:
    """Version of an installed distribution; None if there is none of this name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str]:
    """Versions of those of `packages` that are installed, by name."""
    return {name: found for name in packages if (found := version(name)) is not None}


def processor() -> str:
    """The processor's name as the operating system has it, else its architecture."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """The processor's vector and matrix instruction sets by Linux's names; empty where Linux does not tell."""
    return sorted(flag for flag in _cpuinfo().get("flags", "").split() if flag.startswith(_VECTOR_FLAGS))


def features() -> list[str]:
    """All that code which is compiled for this very processor depends on: the architecture, and what Linux lists."""
    listed = _cpuinfo().get("flags") or _cpuinfo().get("Features") or processor()
    return [platform.machine(), *sorted(listed.split())]


def device_name(device_type: str) -> str:
    """Name of the GPU in use if `device_type` is `cuda`, else of the processor: what a measured figure is true for."""
    if device_type != "cuda":
        return processor()
    import torch

    return torch.cuda.get_device_name()


def hardware() -> str:
    """The accelerators, or else the processor, in a line for reports."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}"


@cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core, by its names; empty on other systems."""
    if not _CPUINFO.is_file():
        return {}
    first = _CPUINFO.read_text("utf-8").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
