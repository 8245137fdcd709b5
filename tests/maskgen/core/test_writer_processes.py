"""Writers in processes of their own: killed at any moment, short of disk, and measured for memory.

The functions that do the work run in a subprocess (`python -c "... import crash_everywhere ..."`), which imports torch
once and forks for every trial, so that nothing forks or dies inside the test runner.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import digest_weights
from maskgen.core.mask import MaskSet
from maskgen.core.writer import CheckpointWriter
from maskgen.export.compress import compress_masks, decompress
from tests.directories import RECIPE, TWO_FOUR, bits, peak_growth_mib, read_all

ROOT = Path(__file__).parents[3]
MEBI = 1 << 20


def in_subprocess(function: Callable[[Path], object], directory: Path, wrapper: tuple[str, ...] = ()) -> str:
    """Run a function of this file in a fresh interpreter and return what it printed."""
    code = f"import pathlib, {__name__} as m; m.{function.__name__}(pathlib.Path({str(directory)!r}))"
    command = [*wrapper, sys.executable, "-W", "error", "-c", code]
    # glibc keeps freed blocks below this size; without it memory would show what was once used, not what is in use.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(out: Path, numbers: int = 200) -> None:
    with CheckpointWriter(out, {"model_type": "tiny"}, [out.parent / "tokenizer.json"], shard_bytes=2000) as writer:
        for number in range(6):
            writer.add(f"t.{number}", torch.full((numbers,), float(number)))


def check_whole(out: Path) -> None:
    stored = read_all(out)
    assert sorted(stored) == [f"t.{number}" for number in range(6)]
    assert all(bits(stored[f"t.{number}"]) == bits(torch.full((200,), float(number))) for number in range(6))
    assert (out / "config.json").read_text() == '{\n  "model_type": "tiny"\n}\n'
    assert (out / "tokenizer.json").read_text() == "{}"
    assert len(list(out.iterdir())) == 3 + 3


def fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(0)
    return pid


def check_after_kill(directory: Path) -> bool:
    """Check what a killed writer left and that the next one succeeds; returns whether the output had been finished."""
    out = directory / "out"
    finished = out.exists()
    assert {path.name for path in directory.iterdir()} <= {"out", ".out.partial", "tokenizer.json"}
    if not finished:
        write(out)
    check_whole(out)
    assert not (directory / ".out.partial").exists()
    shutil.rmtree(out)
    return finished


def crash_everywhere(directory: Path) -> None:
    """Kill a writer at sampled function calls, all over its life and densely around the final rename, and in writes."""
    (directory / "tokenizer.json").write_text("{}")
    counter = itertools.count()
    write(directory / "out")
    shutil.rmtree(directory / "out")
    sys.setprofile(lambda *_: next(counter) and None)
    write(directory / "out")
    sys.setprofile(None)
    shutil.rmtree(directory / "out")
    events = next(counter)
    finished = []
    for point in [*range(0, events - 200, events // 22), *range(events - 200, events - 10, 15)]:
        calls = itertools.count()

        def crash(calls: itertools.count[int] = calls, point: int = point) -> None:
            sys.setprofile(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(calls) >= point else None)
            write(directory / "out")

        _, status = os.waitpid(fork(crash), 0)
        assert os.WIFSIGNALED(status), f"event {point} of {events} was not reached"
        finished.append(check_after_kill(directory))
    crash_mid_write(directory)
    json.dump({"crashes": len(finished), "finished": sum(finished)}, sys.stdout)


def crash_mid_write(directory: Path) -> None:
    """Kill a writer of large tensors after random delays, so that some die inside a write."""
    delays = random.Random(0)
    for _ in range(6):
        pid = fork(lambda: write(directory / "out", numbers=2 * MEBI))
        time.sleep(delays.random() * 0.08)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if (directory / "out").exists():
            assert len(read_all(directory / "out")) == 6
            shutil.rmtree(directory / "out")
        assert not (directory / "out").exists()
        check_after_kill(directory)


def fill_the_disk(directory: Path) -> None:
    """Write 3 MB where 1 MB fits."""
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match="No space left on device"):
        write(directory / "out", numbers=MEBI // 8)
    assert [path.name for path in directory.iterdir()] == ["tokenizer.json"]
    write(directory / "out")
    check_whole(directory / "out")


def measure_memory(directory: Path) -> None:
    """A 300 MiB model in shards of 20 MiB: write, compress, open, decompress; print the peak growth of each."""
    dense, names = directory / "dense", [f"m.layers.{number}.proj" for number in range(75)]
    kept = torch.tensor([True, False, True, False]).expand(1024, 512, 4).reshape(1024, 2048)
    shard_bytes = 20 * MEBI

    def write_dense() -> None:
        with CheckpointWriter(dense, {"hidden_size": 1024}, shard_bytes=shard_bytes) as writer:
            for number, name in enumerate(names):
                writer.add(name + ".weight", torch.full((1024, 2048), float(number), dtype=torch.bfloat16))

    grown_mib = {"write": peak_growth_mib(write_dense)}
    targets = names[::25]
    masks = MaskSet.from_masks(TWO_FOUR, dict.fromkeys(targets, kept), digest_weights(dense), RECIPE)
    grown_mib["compress"] = peak_growth_mib(
        lambda: compress_masks(dense, masks, directory / "sparse", shard_bytes=shard_bytes)
    )
    shutil.rmtree(dense)
    grown_mib["open"] = peak_growth_mib(lambda: SparseCheckpoint.open(directory / "sparse"))
    grown_mib["decompress"] = peak_growth_mib(
        lambda: decompress(directory / "sparse", directory / "again", shard_bytes=shard_bytes)
    )
    shutil.rmtree(directory / "sparse")
    shutil.rmtree(directory / "again")
    json.dump(grown_mib, sys.stdout)


def test_killed_at_any_call_leaves_nothing_that_opens_and_the_next_writer_succeeds(tmp_path: Path) -> None:
    result = json.loads(in_subprocess(crash_everywhere, tmp_path))
    assert result["crashes"] >= 30
    assert 0 < result["finished"] < 15


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs in a private namespace")
    in_subprocess(fill_the_disk, tmp_path, ("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"))


def test_memory_is_bounded_by_shards_not_by_the_model(tmp_path: Path) -> None:
    grown_mib = json.loads(in_subprocess(measure_memory, tmp_path))
    assert grown_mib["write"] < 40
    assert grown_mib["compress"] < 100
    assert grown_mib["open"] < 60
    assert grown_mib["decompress"] < 100
