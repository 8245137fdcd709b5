"""Two processes under a real `torchrun` learn what one does, replicated and sharded, and say so in one voice."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from maskgen.cli import parser as cli
from maskgen.core.errors import RecipeError
from maskgen.export.compress import load_masks
from maskgen.train.log import LOG_FILE, read
from maskgen.train.parallel import PATIENCE, Group, joined
from tests.maskgen.train import parallel_cases

ModelDir = Callable[..., Path]
WORLD = 2


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes learned in every case, from one start of them."""
    ran = torchrun("-m", "tests.maskgen.train.parallel_cases", str(tmp_path_factory.mktemp("checkpoints")))
    assert ran.returncode == 0, ran.stderr
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("{"))
    return dict(json.loads(line))


@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "shards"])
@pytest.mark.parametrize("case", parallel_cases.CASES)
def test_two_processes_learn_what_one_does(case: str, shard: bool, two_processes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    alone = parallel_cases.learned(case, Group())
    together = two_processes[parallel_cases.key(case, shard)]
    rounding = 50 if parallel_cases.CASES[case][2].get("dtype") == "bfloat16" else 1
    assert together["losses"] == pytest.approx(alone["losses"], rel=2e-5 * rounding)
    assert together["gradient_norms"] == pytest.approx(alone["gradient_norms"], rel=1e-4 * rounding)
    assert together["heldout"] == pytest.approx(alone["heldout"], rel=1e-4 * rounding)
    differing = [
        a != b
        for one, other in zip(alone["masks"], together["masks"], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    assert sum(differing) <= 0.001 * len(differing)


@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "shards"])
@pytest.mark.parametrize("case", parallel_cases.RESUMED)
def test_two_processes_go_on_with_the_same_bits(case: str, shard: bool, two_processes: dict[str, Any]) -> None:
    assert two_processes[parallel_cases.key(case, shard)]["resumed"] == []


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["replicas", "shards"])
def test_the_command_under_torchrun(shard: list[str], model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    dense, out, reference = model_dir("llama_tied"), tmp_path / "two", tmp_path / "one"
    words = ["run", "maskllm", "--model", str(dense), "--data", str(text_file), "--micro-batch", "2"]
    for setting in ("steps=4", "batch=4", "window_tokens=16", "heldout_windows=4", 'dtype="float32"', "lr=0.1"):
        words += ["--set", f"train.{setting}"]
    # a small eps would make the first step the sign of the gradient: rounding alone would decide between patterns
    words += ["--set", "method.adam_eps=1e-3", "--set", "calibration.samples=8", "--checkpoint-every", "2"]
    ran = torchrun("-m", "maskgen", *words, "--out", str(out), *shard)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(f"wrote {out}") == 1
    assert cli.main([*words, "--out", str(reference)]) == 0
    log, alone = read(out / LOG_FILE), read(reference / LOG_FILE)
    assert log[0]["hardware"]["processes"] == WORLD
    assert [record["kind"] for record in log] == [record["kind"] for record in alone]
    final = [record["heldout_nll"] for record in log if record["kind"] == "eval"]
    assert final == pytest.approx([record["heldout_nll"] for record in alone if record["kind"] == "eval"], rel=1e-4)
    masks, expected = load_masks(out), load_masks(reference)
    same = [torch.equal(masks.mask(name), expected.mask(name)) for name in expected.names]
    assert sum(same) >= len(same) - 1


def test_process_0_makes_the_weights_that_all_start_from(model_dir: ModelDir, text_file: Path, tmp_path: Path) -> None:
    out, reference = tmp_path / "two", tmp_path / "one"
    words = ["run", "best-effort", "--model", str(model_dir()), "--data", str(text_file), "--eval-every", "2"]
    for setting in ("steps=4", "batch=4", "window_tokens=16", "heldout_windows=4", 'dtype="float32"', "lr=1e-4"):
        words += ["--set", f"train.{setting}"]
    words += ["--set", "calibration.samples=8", "--set", "calibration.window_tokens=16", "--keep-work"]
    ran = torchrun("-m", "maskgen", *words, "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(f"wrote {out}") == 1
    assert cli.main([*words, "--out", str(reference)]) == 0
    log, alone = read(out / LOG_FILE), read(reference / LOG_FILE)
    assert log[0]["hardware"]["processes"] == WORLD and log[0]["digests"]["start"] == alone[0]["digests"]["start"]
    looks = [[record["heldout_nll"] for record in each if record["kind"] == "eval"] for each in (log, alone)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-4) and len(looks[0]) == 3


def test_what_the_first_finds_is_told_to_all(two_processes: dict[str, Any]) -> None:
    assert two_processes["told"] == "process 0" and two_processes["told to all"] == WORLD
    assert Group().broadcast(lambda: "found") == "found"


def test_windows_are_divided_with_their_noise_samples() -> None:
    windows_BT = torch.arange(8).view(8, 1)
    for world, samples in ((1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2), (8, 8)):
        seen = []
        for rank in range(world):
            parts = Group(rank, world).parts(windows_BT, samples, micro_batch=3)
            assert all(0 < len(ids_BT) <= 3 for _, ids_BT in parts)
            seen += [(sample, int(window)) for sample, ids_BT in parts for window in ids_BT]
        assert seen == [(window * samples // 8, window) for window in range(8)]


@pytest.mark.parametrize(("world", "batch", "samples"), [(2, 5, 1), (3, 6, 2), (2, 4, 3), (1, 4, 3)])
def test_a_batch_that_cannot_be_divided(world: int, batch: int, samples: int) -> None:
    with pytest.raises(RecipeError, match=rf"train\.batch {batch} with train\.noise_samples {samples} .* {world} proc"):
        Group(0, world).check_batch(batch, samples)


def test_sharding_needs_torchrun() -> None:
    with pytest.raises(RecipeError, match=r"`shard` .* torchrun"), joined("cpu", shard=True):
        pass


def test_alone_nothing_is_exchanged() -> None:
    with joined("cpu", shard=False) as group:
        assert (group.rank, group.world, group.first, group.any(True), group.any(False)) == (0, 1, True, True, False)
        assert group.total(torch.tensor([2.0])).tolist() == [2.0]


def test_only_process_0_is_waited_for_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A collective that hangs is noticed in minutes; a barrier lasts as long as a sweep may."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    usual = dist.distributed_c10d.default_pg_timeout
    with joined("cpu", shard=False) as group:
        assert group.waiting is not None
        limits = [each._get_backend(torch.device("cpu")).options._timeout for each in (dist.group.WORLD, group.waiting)]
    assert limits == [usual, PATIENCE] and usual < PATIENCE


def test_a_wait_is_a_barrier_of_the_patient_group(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(dist, "barrier", waited.append)
    Group(0, 2, waiting=dist.ProcessGroup(0, 2)).wait()
    Group().wait()
    assert [type(group) for group in waited] == [dist.ProcessGroup]
