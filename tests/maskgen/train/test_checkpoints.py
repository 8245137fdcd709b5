"""Checkpoints: they hold everything, they are whole or absent, and the newest whole one is found."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgen.core.errors import NumericalError, OutputExistsError
from maskgen.train import checkpoints as checkpoints_module
from maskgen.train.checkpoints import Checkpoints
from maskgen.train.step import Session
from tests.maskgen.training import Toy, assert_same, corpus, largest_file, session, state

RUN = "sha256:" + "7" * 64
EVERYTHING = {"learns_weights": {"scope": "all"}, "masks": {}}


def begin(kind: str) -> Session:
    return session(Toy(learns_weights=kind == "learns_weights"), **EVERYTHING[kind])


def advance(of: Session, steps: int) -> Session:
    for _ in range(steps):
        of.run_step(corpus(), 4)
    return of


def optimizer_state(of: Session) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": value.clone()
        for number, parameter in enumerate(of.parameters)
        for name, value in of.optimizer.state[parameter].items()
    }


@pytest.fixture
def two(tmp_path: Path) -> tuple[Checkpoints, Session]:
    """Checkpoints of steps 2 and 4 of a run."""
    checkpoints, trained = Checkpoints(tmp_path / "c", RUN), session()
    for _ in range(2):
        checkpoints.save(advance(trained, 2), {})
    assert checkpoints.steps() == [2, 4]
    return checkpoints, trained


@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_restored_session_is_the_same_to_the_last_bit_and_stays_so(kind: str, tmp_path: Path) -> None:
    whole = advance(begin(kind), 5)
    extra = {"masks": torch.arange(6, dtype=torch.uint8)}
    Checkpoints(tmp_path / "c", RUN).save(whole, extra)
    resumed, found = begin(kind), {"masks": torch.zeros(6, dtype=torch.uint8)}
    assert Checkpoints(tmp_path / "c", RUN).restore(resumed, found)
    assert resumed.step == 5 and torch.equal(found["masks"], extra["masks"])
    assert 0 < resumed.earlier_s <= whole.elapsed_s
    assert_same(state(whole), state(resumed))
    assert_same(optimizer_state(whole), optimizer_state(resumed))
    assert_same(state(advance(whole, 3)), state(advance(resumed, 3)))
    assert_same(optimizer_state(whole), optimizer_state(resumed))


def test_a_result_can_be_written_from_the_model_alone(two: tuple[Checkpoints, Session]) -> None:
    checkpoints, trained = two
    found, nothing = session(), session()
    assert Checkpoints(checkpoints.folder, RUN).restore_model(found) and found.step == 4
    assert_same(state(found), state(trained))
    assert not found.optimizer.state and all(parameter.grad is None for parameter in found.parameters)
    assert not Checkpoints(checkpoints.folder.with_name("none"), RUN).restore_model(nothing) and nothing.step == 0


def test_other_names_in_the_folder_are_nobodys_business(two: tuple[Checkpoints, Session]) -> None:
    checkpoints, trained = two
    for name in ("step-x", "step-12", "step-000004.old", "notes"):
        (checkpoints.folder / name).mkdir()
    assert checkpoints.steps() == [2, 4]
    checkpoints.save(advance(trained, 2), {})
    assert checkpoints.steps() == [4, 6] and (checkpoints.folder / "step-x").is_dir()


def test_frozen_weights_are_not_stored_and_nothing_is_pickled(two: tuple[Checkpoints, Session]) -> None:
    checkpoints, trained = two
    folder = checkpoints.folder / "step-000004"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    (shard,) = folder.glob("*.safetensors")
    names = {name for name in load_file(shard) if name.startswith("model.")}
    assert names == {f"model.{layer}.{part}" for layer in trained.layers for part in ("score", "kept_OI")}


def test_without_a_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    begun = session()
    assert not Checkpoints(tmp_path / "c", RUN).restore(begun, {})
    assert begun.step == 0 and not begun.optimizer.state
    assert_same(state(begun), state(session()))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints, trained = Checkpoints(tmp_path / "c", RUN, keep=3), session()
    for _ in range(5):
        checkpoints.save(advance(trained, 1), {})
    assert checkpoints.steps() == [3, 4, 5]
    before = (checkpoints.folder / "step-000005").stat().st_mtime_ns
    checkpoints.save(trained, {})
    assert (checkpoints.folder / "step-000005").stat().st_mtime_ns == before, "a step is saved once"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest", "bad manifest", "no shard", "other digest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: str, two: tuple[Checkpoints, Session], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, _ = two
    folder = checkpoints.folder / "step-000004"
    (shard,) = folder.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-5] ^= 1
        shard.write_bytes(data)
    elif damage == "no shard":
        shard.unlink()
    elif damage == "no manifest":
        (folder / "checkpoint.json").unlink()
    elif damage == "bad manifest":
        (folder / "checkpoint.json").write_text("{")
    else:
        manifest = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**manifest, "shards": "sha256:" + "0" * 64}))
    resumed = session()
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(checkpoints.folder, RUN).restore(resumed, {})
    assert resumed.step == 2 and "step-000004" in caplog.text and len(caplog.records) == 1
    assert_same(state(resumed), state(advance(session(), 2)))
    again = Checkpoints(checkpoints.folder, RUN)
    again.saved_step = 2
    again.save(advance(resumed, 2), {})
    fresh = session()
    assert Checkpoints(checkpoints.folder, RUN).restore(fresh, {}) and fresh.step == 4


def test_when_all_are_damaged_the_run_starts_over(two: tuple[Checkpoints, Session]) -> None:
    checkpoints, _ = two
    for folder in checkpoints.folder.iterdir():
        (folder / "checkpoint.json").unlink()
    resumed = session()
    assert not checkpoints.restore(resumed, {}) and resumed.step == 0
    assert_same(state(advance(resumed, 1)), state(advance(session(), 1)))


def test_another_run_is_refused(two: tuple[Checkpoints, Session]) -> None:
    with pytest.raises(OutputExistsError, match="belongs to another run"):
        Checkpoints(two[0].folder, "sha256:" + "8" * 64).restore(session(), {})


def test_leftovers_of_a_killed_process_are_cleared(two: tuple[Checkpoints, Session]) -> None:
    folder = two[0].folder
    shutil.copytree(folder / "step-000004", folder / ".step-000006.partial")
    checkpoints = Checkpoints(folder, RUN)
    checkpoints.clean()
    assert checkpoints.steps() == [2, 4] and len(list(folder.iterdir())) == 2


def test_a_disk_that_is_full_leaves_what_there_was(
    two: tuple[Checkpoints, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, trained = two

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints_module, "write_json", full)
    assert_keeps_what_there_was(checkpoints, trained, "No space left on device")


def test_a_file_that_may_not_grow_leaves_what_there_was(two: tuple[Checkpoints, Session]) -> None:
    """A real failure to write in the middle of a shard, inside torch."""
    checkpoints, trained = two
    with largest_file(100_000):
        assert_keeps_what_there_was(checkpoints, trained, "File too large")


def assert_keeps_what_there_was(checkpoints: Checkpoints, trained: Session, reason: str) -> None:
    with pytest.raises(OSError, match=f"step-000005: .*{reason}"):
        checkpoints.save(advance(trained, 1), {})
    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == ["step-000002", "step-000004"]
    assert checkpoints.what_is_kept() == f"the checkpoint of step 4 is kept in {checkpoints.folder}"
    resumed = session()
    assert Checkpoints(checkpoints.folder, RUN).restore(resumed, {}) and resumed.step == 4


def test_nan_is_never_kept(two: tuple[Checkpoints, Session]) -> None:
    checkpoints, trained = two
    advance(trained, 1)
    with torch.no_grad():
        next(iter(trained.layers.values())).score[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"step 5: model\..*score holds NaN or infinity"):
        checkpoints.save(trained, {})
    assert checkpoints.steps() == [2, 4]


def test_a_checkpoint_of_another_model_is_one_clear_error(two: tuple[Checkpoints, Session]) -> None:
    """The digest of the run forbids it; if it happens all the same, nothing is loaded half."""
    checkpoints, _ = two
    folder = checkpoints.folder / "step-000004"
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors.pop(next(name for name in tensors if name.endswith("score")))
    save_file(tensors, shard)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["shards"] = checkpoints_module._digest(folder)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a checkpoint of this model"):
        checkpoints.restore(session(), {})
