"""What happens to people: two runs at once, a model replaced under a run, Ctrl-C, outputs in odd places."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskgen.api import pruning
from maskgen.core.checkpoint import SparseCheckpoint
from tests.maskgen.cli.test_parser import SMALL, run

ModelDir = Callable[..., Path]
ROOT = Path(__file__).parents[3]


def start(*argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "maskgen", *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_runs_with_one_output(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    """Real ones: one of them comes through, the other ends at once with the id of the first; a killed one is no bar."""
    out = tmp_path / "out"
    argv = ["run", "sparsegpt", "--model", model_dir(), "--data", text_file, "--out", out, *SMALL,
            "--set", "calibration.samples=100"]  # fmt: skip
    first = start(*argv)
    while not (tmp_path / ".out.lock").exists() or not (tmp_path / ".out.lock").read_text():
        assert first.poll() is None
        time.sleep(0.01)
    second = start(*argv)
    _, errors = second.communicate(timeout=120)
    if not out.exists():  # else the first was so quick that the second found its result
        assert second.returncode == 2 and re.search(rf"out: process {first.pid} on \S+ is writing it", errors), errors
    assert errors.count("\n") == 1
    first.kill()
    first.communicate()
    third = start(*argv)
    third.communicate(timeout=120)
    assert third.returncode in (0, 2) and SparseCheckpoint.open(out)
    assert not (tmp_path / ".out.lock").exists()


def test_a_model_that_is_replaced_under_a_run(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = shutil.copytree(model_dir(), tmp_path / "dense")
    sweep = pruning.sweep

    def replaced(*args: Any) -> Any:
        shutil.copyfile(model_dir(seed=1) / "model.safetensors", dense / "model.safetensors")
        return sweep(*args)

    monkeypatch.setattr(pruning, "sweep", replaced)
    code, _, errors = run(capsys, "run", "magnitude", "--model", dense, "--out", tmp_path / "out")
    assert (code, errors.count("\n")) == (2, 1)
    assert "dense/model.safetensors: changed while the run was at work" in errors
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_that_the_run_goes_on(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    argv = ["run", "sparsegpt", "--model", model_dir(), "--data", text_file, "--out", tmp_path / "out", *SMALL]
    for doublings in range(8):  # a run may be over before this process is scheduled again
        process = start(*argv, "--set", f"calibration.samples={8000 << doublings}")
        while not (tmp_path / "out.work" / "run.json").exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")
    assert (process.returncode, errors) == (130, "maskgen: interrupted; the same command goes on from what is done\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work"]


@pytest.mark.parametrize("out", [".", "..", "/", "text.txt/x/out", "a/../b/out"])
def test_outputs_in_odd_places(
    out: str, model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").touch()
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, "run", "magnitude", "--model", model_dir(), "--out", out)
    if out == "a/../b/out":
        assert (code, errors) == (0, "")
    else:
        assert (code, errors.count("\n")) == (2, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("masks", ["out", "out/masks.safetensors", "out.work/masks.safetensors"])
def test_masks_have_a_place_of_their_own(
    masks: str, model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "magnitude", "--model", model_dir(), "--out", tmp_path / "out", "--masks-out", tmp_path / masks]
    code, _, errors = run(capsys, *argv)
    assert (code, errors.count("\n")) == (2, 1) and "choose a place outside of it" in errors
    assert list(tmp_path.iterdir()) == []


def test_nobody_reads_the_output_any_more(model_dir: ModelDir) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "maskgen", "inspect", model_dir()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_output_stream_on_a_full_disk(model_dir: ModelDir) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "maskgen", "inspect", model_dir()],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
