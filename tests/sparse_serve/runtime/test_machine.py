"""Facts of this machine, against what the operating system says by another way."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from sparse_serve.runtime import machine


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file in place of Linux's list; it is not there yet, as on another system."""
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "_cpuinfo", machine._cpuinfo.__wrapped__)
    return tmp_path / "cpuinfo"


def test_versions() -> None:
    assert machine.version("torch") == torch.__version__.split("+")[0] or machine.version("torch") == torch.__version__
    assert machine.version("no-such-package") is None
    assert machine.versions("numpy", "no-such-package").keys() == {"numpy"}


def test_memory() -> None:
    assert 0 < machine.available_bytes() <= psutil.virtual_memory().total


def test_cores_are_those_this_process_may_use() -> None:
    cores = machine.usable_cores()
    assert cores == sorted(set(cores)) and 1 <= len(cores) <= (os.cpu_count() or 1)
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    code = f"import os; os.sched_setaffinity(0, {cores[-1:]}); from sparse_serve.runtime import machine; "
    command = [sys.executable, "-c", code + "print(machine.usable_cores())"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"[{cores[-1]}]"


def test_the_processor_is_read_from_linux_s_list(elsewhere: Path) -> None:
    elsewhere.write_text(
        "processor\t: 0\nmodel name\t: Some CPU @ 2: fast\nflags\t\t: fpu fma avx2 sse amx_tile f16c avx\n\n"
        "processor\t: 1\nmodel name\t: Another\nflags\t\t: avx512f\n"
    )
    assert machine.processor() == machine.device_name("cpu") == "Some CPU @ 2: fast"
    assert machine.instructions() == ["amx_tile", "avx", "avx2", "f16c", "fma"]


def test_a_system_without_that_list(elsewhere: Path) -> None:
    assert machine.processor() in (platform.processor(), platform.machine())
    assert machine.instructions() == []


def test_the_instructions_agree_with_the_native_kernel() -> None:
    """Two ways to ask the same processor: Linux's list, and the compiler's built-in test."""
    from maskgen.core.pattern import NMPattern
    from sparse_serve.kernels import LinearSpec, cpu

    if reason := cpu.unsupported_reason(LinearSpec(1, 8, NMPattern(2, 4), torch.float32, "cpu")):
        pytest.skip(reason)
    if not machine.instructions():
        pytest.skip("the system does not tell")
    assert (cpu.isa() != "portable") == ({"avx2", "fma", "f16c"} <= set(machine.instructions()))
    avx512 = {"avx512f", "avx512bw", "avx512_bf16"} <= set(machine.instructions())
    assert (cpu.isa() in ("avx512", "amx")) == avx512
    if cpu.isa() == "amx":  # not the other way round: a sandbox may keep tiles from a process
        assert {"amx_tile", "amx_bf16"} <= set(machine.instructions())


def test_the_gpu_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.device_name("cuda") == "A GPU"
    assert machine.hardware() == "2 x A GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.hardware() == f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}"
