"""What is counted of a server's memory: on a written list, and on a process that holds a known amount."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparse_serve.bench.resident import counted, processor_s, resident_bytes

MB = 1 << 20
SMAPS = """55e0-55f0 r-xp 00000000 08:01 11                         /usr/bin/python3
Rss:                 900 kB
Pss:                 800 kB
Anonymous:             0 kB
55f0-5600 rw-p 00001000 08:01 11                         /usr/bin/python3
Pss:                  40 kB
Anonymous:            40 kB
5600-5700 rw-p 00000000 00:00 0                          [heap]
Pss:                 100 kB
Anonymous:           100 kB
7f00-7f10 rw-p 00000000 00:00 0
Pss:                  10 kB
Anonymous:            10 kB
7f10-7f20 r--s 00000000 08:01 12                         FOLDER/weights with space.gguf
Pss:                2000 kB
Anonymous:             0 kB
7f20-7f30 r--s 00000000 08:01 13                         FOLDER2/other.gguf
Pss:                4000 kB
Anonymous:             0 kB
7f30-7f40 rw-s 00000000 00:01 14                         /dev/shm/psm_1 (deleted)
Pss:                   5 kB
Anonymous:             0 kB
7f40-7f50 rw-s 00000000 00:01 15                         /memfd:ring (deleted)
Pss:                   3 kB
Anonymous:             0 kB
"""


def test_libraries_are_not_counted_but_what_a_process_changed_of_them(tmp_path: Path) -> None:
    smaps = SMAPS.replace("FOLDER", str(tmp_path / "model"))
    own_kib = 40 + 100 + 10 + 5 + 3
    assert counted(smaps, tmp_path / "model") == (own_kib + 2000) << 10
    assert counted(smaps, tmp_path / "model" / "weights with space.gguf") == (own_kib + 2000) << 10
    assert counted(smaps, tmp_path / "none") == own_kib << 10


HOLDS = """
import mmap, pathlib, sys, time
own = bytearray(b"x") * (32 << 20)
file = pathlib.Path(sys.argv[1]).open("rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[at] for at in range(0, len(mapped), 4096))
print("up", flush=True)
while sys.argv[2] == "works": pass
time.sleep(600)
"""


@contextmanager
def holding(file: Path, what: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(file), what], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"up\n"
            yield process.pid
        finally:
            process.kill()


def test_a_process_that_holds_a_known_amount(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "weights.gguf"
    file.write_bytes(b"y" * (16 * MB))
    with holding(file, "sleeps") as pid:
        with_file, without = (resident_bytes(pid, path) for path in (tmp_path / "model", tmp_path / "other"))
    assert with_file is not None and without is not None
    assert with_file - without == pytest.approx(16 * MB, rel=0.01)
    assert 32 * MB <= without < 48 * MB
    assert resident_bytes(pid, tmp_path) is None, "it is gone"


def test_who_computes_uses_the_processor(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"y" * 4096)
    with holding(file, "works") as busy, holding(file, "sleeps") as idle:
        started = processor_s([busy]), processor_s([idle])
        while processor_s([busy]) < started[0] + 0.05:
            pass
        assert processor_s([idle]) == pytest.approx(started[1], abs=0.02)
    assert processor_s([busy]) == 0.0
