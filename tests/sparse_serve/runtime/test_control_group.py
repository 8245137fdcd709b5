"""Memory limits of control groups, of both versions, in files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sparse_serve.engine import vllm_defaults
from sparse_serve.runtime import control_group, machine

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


class Kernel:
    """Its files, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.own, self.mount = folder / "own", folder / "mount"
        self.mount.mkdir()

    def group(self, path: str, **files: object) -> None:
        """A group with these files, whose names have an underscore for the dot."""
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(control_group, "_OWN", kernel.own)
    monkeypatch.setattr(control_group, "_MOUNT", kernel.mount)
    return kernel


def test_version_2_in_a_container(kernel: Kernel) -> None:
    kernel.own.write_text("0::/\n")
    kernel.group("", memory_max=8 * GIB, memory_current=3 * GIB, memory_stat=f"anon 5\nfile 9\ninactive_file {GIB}")
    assert control_group.free_bytes() == 6 * GIB
    kernel.group("", memory_stat=f"inactive_file {GIB}\nactive_file {GIB}")
    assert control_group.free_bytes() == 6 * GIB + GIB // 2, "what was read twice is given up, too, if later"


def test_version_2_takes_the_tightest_of_the_groups_around(kernel: Kernel) -> None:
    kernel.own.write_text("0::/pods/one/server\n")
    kernel.group("", memory_stat="inactive_file 7")
    kernel.group("pods", memory_max=64 * GIB, memory_current=62 * GIB)
    kernel.group("pods/one", memory_max=4 * GIB, memory_current=GIB)
    kernel.group("pods/one/server", memory_max="max", memory_current=GIB)
    assert control_group.free_bytes() == 2 * GIB


def test_version_1_under_the_host_s_path_and_as_a_container_s_root(kernel: Kernel) -> None:
    kernel.own.write_text("5:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc\n0::/docker/abc\n")
    kernel.group("memory", memory_limit_in_bytes=NO_LIMIT_V1, memory_usage_in_bytes=9 * GIB)
    kernel.group("memory/docker/abc", memory_limit_in_bytes=5 * GIB, memory_usage_in_bytes=2 * GIB)
    kernel.group("memory/docker/abc", memory_stat=f"inactive_file 1\ntotal_inactive_file {GIB // 2}")
    assert control_group.free_bytes() == 3 * GIB + GIB // 2
    kernel.own.write_text("4:memory:/docker/not-mounted-here\n")
    kernel.group("memory", memory_limit_in_bytes=5 * GIB, memory_usage_in_bytes=6 * GIB)
    assert control_group.free_bytes() == 0


@pytest.mark.parametrize("own", ["", "0::/\n", "3:cpuset:/\n", "no such line\n", "0::/../../outside\n"])
def test_without_a_limit(kernel: Kernel, own: str) -> None:
    kernel.own.write_text(own)
    kernel.group("", memory_max="max", memory_current=GIB)
    assert control_group.free_bytes() is None


def test_without_control_groups(kernel: Kernel) -> None:
    assert control_group.free_bytes() is None


def test_the_limit_bounds_what_is_available_and_the_kv_cache(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=24 * GIB))
    kernel.own.write_text("0::/\n")
    for left, available, kv_cache_gib in ((8, 8, "2"), (100, 24, "4")):
        kernel.group("", memory_max=(left + 1) * GIB, memory_current=GIB)
        assert machine.available_bytes() == available * GIB
        environ: dict[str, str] = {}
        vllm_defaults.set_cpu(environ, ranks=1, eager=False, cores=[0])
        assert environ["VLLM_CPU_KVCACHE_SPACE"] == kv_cache_gib
