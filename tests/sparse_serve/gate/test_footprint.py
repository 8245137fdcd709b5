"""Memory of processes as Linux counts it, and of GPUs as their driver does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from sparse_serve.gate import footprint
from tests.directories import dense_dir

MB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count")
def test_the_peak_of_a_family_counts_what_is_freed_again(tmp_path: Path) -> None:
    """A parent and a child, each of which took 60 MB for a moment."""
    take = "import sys; held = bytearray(b'x') * (60 << 20); del held; "
    child = f'{take}print("ready", flush=True); sys.stdin.read()'
    parent = f"{take}import subprocess; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        reading = footprint.read(footprint.tree(process.pid), dense_dir(tmp_path / "model"), None)
        now = sum(one.memory_info().rss for one in footprint.tree(process.pid))
    assert reading is not None
    assert reading.processes == 2
    assert 120 * MB < reading.peak_rss_bytes < 240 * MB and now < reading.peak_rss_bytes - 100 * MB
    assert reading.weight_bytes == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert footprint.tree(process.pid) == set() and footprint.read(set(), None, None) is None


def test_a_process_that_has_ended_is_left_out() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    family = {psutil.Process(os.getpid()), psutil.Process(ended.pid)}
    ended.wait()
    reading = footprint.read(family, None, 7)
    assert reading is not None and (reading.processes, reading.gpu_bytes, reading.weight_bytes) == (1, 7, None)


def test_what_gpus_hold_more_than_before_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [10, 20]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device: used[device])
    before = footprint.gpu_bytes()
    used[1] += 5
    assert (before, footprint.gpu_bytes_since(before)) == (30, 5)
    used[:] = [0, 0]
    assert footprint.gpu_bytes_since(before) == 0

    def without_the_library(device: int) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "device_memory_used", without_the_library)
    assert footprint.gpu_bytes() is None and footprint.gpu_bytes_since(before) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert footprint.gpu_bytes() is None and footprint.gpu_bytes_since(None) is None
