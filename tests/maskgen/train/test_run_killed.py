"""`kill -9` at any moment and the same command again: the same bits as if nothing had happened.

A nursery process imports everything once; each attempt is a fork of it, which is killed at a random moment of its life.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.mask import MaskSet
from maskgen.train.log import LOG_FILE, read
from tests.maskgen.cli.test_parser import run

SEED = 1
ModelDir = Callable[..., Path]

NURSERY = """
import json, os, random, shutil, signal, sys, time
import torch
from maskgen.cli import parser as cli, verbs

def attempt(argv, kill_after_s):
    child = os.fork()
    if child == 0:
        log = open(argv[-1] + ".log", "w")
        sys.stdout = sys.stderr = log
        code = cli.main(argv)
        log.flush()
        os._exit(code)
    began_s = time.monotonic()
    while kill_after_s is None or time.monotonic() - began_s < kill_after_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, time.monotonic() - began_s
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], kill_after_s

argv, outs, seed = json.loads(sys.argv[1]), sys.argv[2:4], int(sys.argv[4])
torch.set_num_threads(1)
status, whole_s = attempt([*argv, "--out", outs[0]], None)
assert status == 0, status
rng, killed = random.Random(seed), 0
while killed < 4:
    status, _ = attempt([*argv, "--out", outs[1]], rng.uniform(0, 0.7 * whole_s))
    assert status in (0, signal.SIGKILL), open(outs[1] + ".log").read()
    if status == 0:
        break
    killed += 1
    if os.path.isdir(outs[1]):  # killed when the result was there already, so that nothing is left to go on from
        for late in (outs[1], outs[1] + ".work"):
            shutil.rmtree(late, ignore_errors=True)
else:
    assert attempt([*argv, "--out", outs[1]], None)[0] == 0
assert killed, "too fast to be killed"
print(killed)
"""

TRAIN = """
[train]
steps = 8
batch = 4
window_tokens = 16
heldout_windows = 4
dtype = "float32"
"""
RECIPES = {
    "frozen weights": '[method]\nname = "maskllm"\ninit_noise = true\n[prior]\nname = "wanda"\n' + TRAIN,
    "weights of a prior": '[method]\nname = "adaptive_sparse"\nweights = "prior"\n[prior]\nname = "sparsegpt"\n'
    + TRAIN,
    "trained weights": '[method]\nname = "adaptive_sparse"\n' + TRAIN + 'scope = "all"\n',
}
FLAGS = ["--set", "calibration.samples=8", "--eval-every", "3", "--checkpoint-every", "2"]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("elapsed_s", "peak_memory_bytes")}


@pytest.mark.parametrize("kind", RECIPES)
def test_killed_at_random_and_started_again(kind: str, model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPES[kind])
    argv = ["run", str(recipe), "--model", str(model_dir()), "--data", str(text_file), *FLAGS]
    outs = [tmp_path / "whole", tmp_path / "killed"]
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, json.dumps(argv), *map(str, outs), str(SEED)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, killed = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == [LOG_FILE]
    logs = [[timeless(record) for record in read(out / LOG_FILE)] for out in outs]
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0] if record["kind"] == "step"] == list(range(1, 9))
    assert [record["step"] for record in logs[0] if record["kind"] == "eval"] == [0, 3, 6, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed",
        "killed.log",
        "recipe.toml",
        "whole",
        "whole.log",
    ]


@pytest.mark.parametrize("moment", ["before", "while"])
def test_killed_while_it_cleans_up(
    moment: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The result is there and whole; the same command says so, and does what was left."""
    recipe, out, masks = tmp_path / "recipe.toml", tmp_path / "out", tmp_path / "masks.safetensors"
    recipe.write_text(RECIPES["frozen weights"])
    argv = ["run", recipe, "--model", model_dir(), "--data", text_file, *FLAGS, "--out", out, "--masks-out", masks]
    assert run(capsys, *argv, "--keep-work")[0] == 0
    expected = MaskSet.load(masks)
    masks.unlink()
    code, _, errors = run(capsys, *argv)
    assert code == 2 and "out exists; remove it" in errors, "its work directory was asked for: it is no leftover"
    assert (tmp_path / "out.work" / "run.json").is_file()
    if moment == "before":
        (tmp_path / "out.work" / "kept").unlink()
    else:
        (tmp_path / "out.work" / "run.json").unlink()
        (tmp_path / "out.work").rename(tmp_path / "out.work.removing")
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    code, said, _ = run(capsys, *argv)
    assert code == 0 and "is finished" in said
    assert not (tmp_path / "out.work").exists() and not (tmp_path / "out.work.removing").exists()
    found = MaskSet.load(masks)
    assert (found.digest(), found.base_digest) == (expected.digest(), expected.base_digest)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made
    assert run(capsys, *argv)[0] == 2, "it exists, and nothing is left to do"
    (tmp_path / "out.work").mkdir()
    assert run(capsys, *argv)[0] == 2 and (tmp_path / "out.work").is_dir(), "no run's directory is somebody's own"
    (tmp_path / "out.work" / "run.json").write_text("{}")
    other = [*argv, "--set", "train.lr=1e-9"]
    assert "of another recipe" in run(capsys, *other)[2]
