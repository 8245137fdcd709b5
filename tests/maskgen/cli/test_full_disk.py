"""Disks that are full, at every write of every verb: exit 2, one line, nothing half-written, and runs that go on.

A write is only sure after `fsync`, so that is where a disk says that it is full: the first call fails, then the second,
and so on, until the command comes through.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskgen.core.checkpoint import SparseCheckpoint
from tests import models
from tests.directories import bits, read_all
from tests.maskgen.cli.test_parser import run
from tests.maskgen.training import largest_file

ModelDir = Callable[..., Path]
DATA = ["--set", "calibration.window_tokens=32", "--set", "calibration.samples=4"]
TRAINED = ["--set", "train.window_tokens=32", "--set", "train.steps=2", "--set", "train.batch=2", *DATA]
MOST_WRITES = 400


@pytest.fixture
def places(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> dict[str, Path]:
    dense = shutil.copytree(model_dir(), tmp_path / "dense")
    return {"dense": dense, "text": text_file, "out": tmp_path / "made" / "out", "masks": tmp_path / "made" / "m.st"}


def one_shot(places: dict[str, Path]) -> list[object]:
    return ["run", "magnitude", "--model", places["dense"], "--data", places["text"], "--out", places["out"],
            "--masks-out", places["masks"]]  # fmt: skip


def learned(places: dict[str, Path]) -> list[object]:
    return ["run", "proxsparse", "--model", places["dense"], "--data", places["text"], "--out", places["out"],
            *TRAINED, "--checkpoint-every", 1, "--masks-out", places["masks"]]  # fmt: skip


def permuted(places: dict[str, Path]) -> list[object]:
    return ["permute", "magnitude", "--model", places["dense"], "--out", places["out"]]


def measured(places: dict[str, Path]) -> list[object]:
    return ["eval", places["dense"], "--data", places["text"], "--window", 32, "--max-windows", 2, "--json",
            places["out"], "--windows-out", places["masks"]]  # fmt: skip


class FullDisk:
    """`os.fsync` fails at its `fails_at`-th call and all later ones; 0 never."""

    def __init__(self) -> None:
        self.calls = self.fails_at = 0
        self._fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        self.calls += 1
        if self.fails_at and self.calls >= self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FullDisk]:
    full = FullDisk()
    monkeypatch.setattr(os, "fsync", full)
    yield full


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")] if folder.exists() else []


@pytest.mark.parametrize(("verb", "step"), [(one_shot, 1), (learned, 4), (permuted, 2), (measured, 1)])
def test_every_write_may_meet_a_full_disk(
    verb: Callable[[dict[str, Path]], list[object]],
    step: int,
    places: dict[str, Path],
    disk: FullDisk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command again and again, on a disk with room for a little more each time."""
    argv, failures = verb(places), 0
    for allowed in range(1, MOST_WRITES, step):
        disk.calls, disk.fails_at = 0, allowed
        code, _, errors = run(capsys, *argv)
        if code == 0:
            break
        failures += 1
        assert (code, errors.count("\n")) == (2, 1), errors
        assert errors.startswith(f"maskgen: error: {places['out'].parent}/")
        assert "No space left on device; make room" in errors and ".partial" not in errors
        assert leftovers(places["out"].parent) == []
        if places["out"].is_dir():  # whole: only what comes after it is missing
            read_all(places["out"])
            if verb is permuted:
                shutil.rmtree(places["out"])
    assert code == 0 and failures > 3
    there = places["out"].read_bytes() if verb is measured else read_all(places["out"])
    shutil.rmtree(places["out"].parent)
    disk.fails_at = 0
    assert run(capsys, *argv)[0] == 0
    if verb is measured:
        assert places["out"].read_bytes() == there
    else:
        again = read_all(places["out"])
        assert {name: bits(tensor) for name, tensor in again.items()} == {
            name: bits(tensor) for name, tensor in there.items()
        }


@pytest.mark.parametrize("verb", ["compress", "quantise", "decompress"])
def test_conversions_may_meet_a_full_disk(
    verb: str, places: dict[str, Path], tmp_path: Path, disk: FullDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = tmp_path / "sparse"
    models.save_sparse(places["dense"], sparse)
    given = {"compress": [places["dense"], sparse], "quantise": [sparse, "--values", "int8"], "decompress": [sparse]}
    for allowed in range(1, MOST_WRITES):
        disk.calls, disk.fails_at = 0, allowed
        code, _, errors = run(capsys, verb, *given[verb], "--out", places["out"])
        if code == 0:
            break
        named = rf"maskgen: error: {re.escape(str(places['out']))}(/[\w.-]+)?: No space left on device; "
        assert code == 2 and re.match(named, errors) and ".partial" not in errors, errors
        assert leftovers(places["out"].parent) == []
        shutil.rmtree(places["out"], ignore_errors=True)
    assert code == 0 and allowed > 4


@pytest.mark.parametrize("size_bytes", [100, 5_000, 20_000, 100_000])
def test_a_file_that_may_not_grow(size_bytes: int, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A real failure to write, in Python or inside safetensors, whatever comes first."""
    argv = one_shot(places)
    with largest_file(size_bytes):
        code, _, errors = run(capsys, *argv)
    assert (code, errors.count("\n")) == (2, 1) and "File too large" in errors
    assert not places["out"].exists() and leftovers(places["out"].parent) == []
    assert run(capsys, *argv)[0] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_small_disk(places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "made"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, _, errors = run(capsys, *one_shot(places))
        assert (code, errors.count("\n")) == (2, 1) and "No space left on device; make room" in errors
        assert not places["out"].exists() and leftovers(small) == []
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        assert run(capsys, *one_shot(places))[0] == 0
        SparseCheckpoint.open(places["out"])
    finally:
        subprocess.run(["umount", "-l", small], check=True)
