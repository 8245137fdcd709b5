"""What `gpu_kernels` makes of a measuring process that dies. A small program stands in for `gpu_measure`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench import gpu_kernels
from tests.bench.gpu_kernels import measure
from tests.bench.gpu_kernels_table import lines
from tests.bench.gpu_measure import DENSE_FP8, KERNELS, REPLAYING, Progress

STAND_IN = """
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("shape"); parser.add_argument("--to"); parser.add_argument("--tokens")
parser.add_argument("--without", default="")
args = parser.parse_args()
log = pathlib.Path(os.environ["TRIES"])
tries = log.read_text().count("\\n") if log.exists() else 0
with log.open("a") as file: file.write(args.without + "\\n")
without, found = args.without.split(","), {
    "out_features": 64, "in_features": 64, "failed": {}, "bytes": {}, "graph_s": {}, "wall_s": {}, "splits_s": {}}
def doing(what):
    found["doing"] = what
    pathlib.Path(args.to).write_text(json.dumps(found))
    if os.environ["FATE"].split(":")[:2] == [what, str(count)]:
        how = os.environ["FATE"].split(":")[2]
        if how == "hang": time.sleep(60)
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        sys.exit("oh no")
count = 0
if os.environ["FATE"] == f"start:{tries}": sys.exit("no start")
for count in map(int, args.tokens.split(",")):
    for name in ("dense", *NAMES):
        if name in without: continue
        doing(name)
        found["graph_s"].setdefault(count, {})[name] = found["bytes"][name] = 1.0 + tries
    doing("replaying")
found["splits_s"]["skinny"] = {"1": {"1x4": 1.0}}
doing("")
""".replace("NAMES", repr((DENSE_FP8, *KERNELS)))

COMMAND = (sys.executable, "-I", "-c", STAND_IN)
EVERYBODY = {"dense", DENSE_FP8, *KERNELS}


class Tries:
    """How the measuring process shall end, and with which `--without` it was started each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
        self.monkeypatch, self.log = monkeypatch, log
        monkeypatch.setenv("TRIES", str(log))

    def __call__(self, fate: str) -> dict[str, Any]:
        self.monkeypatch.setenv("FATE", fate)
        return measure("64x64", "1,8,32", COMMAND)

    @property
    def without(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tries:
    return Tries(monkeypatch, tmp_path / "tries")


def test_nothing_happens(tries: Tries) -> None:
    found = tries("never")
    assert tries.without == [""] and found["failed"] == {} and "doing" not in found
    assert {count: set(times) for count, times in found["graph_s"].items()} == dict.fromkeys((1, 8, 32), EVERYBODY)
    assert found["splits_s"] == {"skinny": {1: {"1x4": 1.0}}}


@pytest.mark.parametrize(("how", "end"), [("kill", "its process ended with -9: "), ("exit", "ended with 1: oh no")])
@pytest.mark.parametrize("culprit", [DENSE_FP8, "skinny int8", "cusparselt"])
def test_the_shape_is_tried_again_without_who_crashed_and_what_was_known_stays(
    tries: Tries, culprit: str, how: str, end: str
) -> None:
    found = tries(f"{culprit}:8:{how}")
    assert tries.without == ["", culprit]
    assert set(found["failed"]) == {culprit} and end in found["failed"][culprit]
    assert {count: set(times) for count, times in found["graph_s"].items()} == {
        1: EVERYBODY,
        8: EVERYBODY - {culprit},
        32: EVERYBODY - {culprit},
    }
    assert found["graph_s"][1][culprit] == 1.0 and found["graph_s"][1]["dense"] == 2.0, "the whole try goes before"
    assert found["bytes"].keys() == EVERYBODY


def test_who_crashed_while_all_take_turns_cannot_be_named(tries: Tries) -> None:
    found = tries(f"{REPLAYING}:8:kill")
    assert tries.without == [""] and set(found["failed"]) == {REPLAYING}
    assert set(found["graph_s"]) == {1, 8}


def test_a_hang_is_a_crash(tries: Tries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "LIMIT_S", 1.5)
    found = tries("skinny:1:hang")
    assert found["failed"]["skinny"] == "took more than 2 s" and tries.without[:2] == ["", "skinny"]


def test_a_process_that_does_not_start_is_not_tried_for_ever(tries: Tries) -> None:
    found = tries("start:0")
    assert tries.without == [""]
    assert found["failed"] == {"starting": "its process ended with 1: no start"} and found["graph_s"] == {}


def test_a_second_try_that_does_not_start_leaves_what_the_first_found(tries: Tries) -> None:
    stand_in = STAND_IN.replace('if os.environ["FATE"] ==', 'if tries == 1 or os.environ["FATE"] ==')
    tries.monkeypatch.setenv("FATE", "skinny:32:kill")
    found = measure("64x64", "1,8,32", (sys.executable, "-I", "-c", stand_in))
    assert tries.without == ["", "skinny"] and set(found["failed"]) == {"skinny", "starting"}
    assert set(found["graph_s"]) == {1, 8, 32} and found["graph_s"][8].keys() == EVERYBODY


def test_a_crash_of_the_rest_leaves_the_shapes_before_it_in_the_file(
    tries: Tries, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file is written after every shape, and a table can be made of what a crash left."""
    first = tries("skinny:8:kill")

    def measured(size: str, tokens: str) -> dict[str, Any]:
        if size != "64x64":
            raise KeyboardInterrupt
        return first

    monkeypatch.setattr(gpu_kernels, "measure", measured)
    monkeypatch.setattr(gpu_kernels, "machine", lambda: {"gpu": "A GPU", "versions": {}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "--out", str(tmp_path / "out"), "--shapes", "a=64x64,b=1x1"])
    with pytest.raises(KeyboardInterrupt):
        gpu_kernels.main()
    (file,) = (tmp_path / "out").iterdir()
    written = json.loads(file.read_text())
    assert file.name.startswith("gpu-kernels--block-bfloat16--a-gpu--")
    assert written["shapes"]["a"]["graph_s"]["1"].keys() == EVERYBODY
    machine = {"gpu": "A GPU", "versions": {}, "cusparselt_alpha_per_row": "right"}
    text = list(lines({"machine": machine, "shapes": {"a": first}, "copy_bytes_per_s": 1e12}))
    assert any(line.startswith("FAILED a: skinny: its process ended with -9") for line in text)
    assert any(line.split()[:2] == ["8", "cusparselt"] for line in text)


def test_a_probe_that_dies_or_hangs_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as limited:
        limited.setattr(gpu_kernels, "LIMIT_S", 0.05)
        assert gpu_kernels.probe("copy_bandwidth") is None
    ends = iter([SimpleNamespace(stdout="right\n", returncode=0), SimpleNamespace(stdout="ri", returncode=-11)])
    monkeypatch.setattr(gpu_kernels.subprocess, "run", lambda *args, **options: next(ends))
    assert gpu_kernels.probe("alpha_per_row") == "right"
    assert gpu_kernels.probe("alpha_per_row") is None


def test_progress_says_what_comes_next_before_it_comes(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "shape.json", {"graph_s": {}})
    progress.found["graph_s"][1] = {"dense": 0.5}
    progress.doing("skinny")
    assert json.loads((tmp_path / "shape.json").read_text()) == {"graph_s": {"1": {"dense": 0.5}}, "doing": "skinny"}
