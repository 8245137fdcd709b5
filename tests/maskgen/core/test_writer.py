"""Writing directories: what Hugging Face expects, whole or not at all."""

from __future__ import annotations

import errno
import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from maskgen.core import writer as writer_module
from maskgen.core.errors import OutputExistsError, StorageError
from maskgen.core.writer import CheckpointWriter
from tests.directories import bits, read_all
from tests.faults import Fault, errno_of, injected

CONFIG = {"model_type": "tiny", "name": "größe"}


def tensors(count: int = 7) -> dict[str, Tensor]:
    return {f"t.{number}": torch.full((25,), float(number)) for number in range(count)}


def write(out: Path, **options: Any) -> CheckpointWriter:
    with CheckpointWriter(out, CONFIG, **options) as writer:
        for name, tensor in tensors().items():
            writer.add(name, tensor)
    return writer


def test_one_shard(tmp_path: Path) -> None:
    assert write(tmp_path / "out").total_bytes == 700
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8")) == CONFIG
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_shards_as_hugging_face_names_them(tmp_path: Path) -> None:
    write(tmp_path / "out", shard_bytes=250)
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    assert index == {
        "metadata": {"total_size": 700},
        "weight_map": {f"t.{number}": names[number // 2] for number in range(7)},
    }
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    assert {name: bits(tensor) for name, tensor in read_all(tmp_path / "out").items()} == {
        name: bits(tensor) for name, tensor in tensors().items()
    }
    for name in names[:3]:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) == 200  # noqa: SIM118


@pytest.mark.parametrize("shard_bytes, shards", [(1, 7), (99, 7), (100, 7), (199, 7), (200, 4), (700, 1), (699, 2)])
def test_a_shard_is_at_most_its_size_or_one_tensor(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    write(tmp_path / "out", shard_bytes=shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards


def test_layouts_are_made_contiguous_and_parameters_detached(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.add("t", matrix.T)
        writer.add("rows", matrix[1:])
        writer.add("p", torch.nn.Parameter(matrix.clone()))
    stored = read_all(tmp_path / "out")
    assert torch.equal(stored["t"], matrix.T)
    assert torch.equal(stored["rows"], matrix[1:])
    assert torch.equal(stored["p"], matrix)


def test_files_and_extra_json_travel_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\x00exactly")
    write(tmp_path / "out", files=[tmp_path / "tokenizer.json"], extra={"recipe.json": {"method": "wanda"}})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\x00exactly"
    assert json.loads((tmp_path / "out" / "recipe.json").read_text()) == {"method": "wanda"}
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8")) == CONFIG


@pytest.mark.parametrize("kind", ["directory", "full", "file"])
def test_an_existing_output_is_not_touched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.write_text("mine") if kind == "file" else out.mkdir()
    if kind == "full":
        (out / "model.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError, match="out exists; remove it or choose another"):
        write(out)
    if kind == "full":
        assert (out / "model.safetensors").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError), CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.add("t", torch.ones(1))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_dot_is_a_directory_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputExistsError):
        write(Path())
    write(Path("out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_two_writers_at_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {}) as first:
        first.add("t", torch.ones(1))
        with (
            pytest.raises(OutputExistsError, match="another process is writing it"),
            CheckpointWriter(tmp_path / "out", {}),
        ):
            raise AssertionError("two writers hold one output")
    assert list(read_all(tmp_path / "out")) == ["t"]


def test_a_writer_that_locks_a_directory_just_renamed_away_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_flock = writer_module.fcntl.flock

    def slow_flock(descriptor: int, operation: int) -> None:
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        real_flock(descriptor, operation)

    monkeypatch.setattr(writer_module.fcntl, "flock", slow_flock)
    with pytest.raises(OutputExistsError, match="another process"):
        write(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_of_many_threads_one_wins_and_its_output_is_whole(tmp_path: Path) -> None:
    results: list[str] = []

    def run(number: int) -> None:
        try:
            with CheckpointWriter(tmp_path / "out", {"writer": number}, shard_bytes=100) as writer:
                for name in tensors():
                    writer.add(name, torch.full((25,), float(number)))
            results.append("won")
        except OutputExistsError:
            results.append("refused")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["refused"] * 7 + ["won"]
    winner = json.loads((tmp_path / "out" / "config.json").read_text())["writer"]
    assert all(tensor.eq(winner).all() for tensor in read_all(tmp_path / "out").values())
    assert len(read_all(tmp_path / "out")) == 7


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "out", {}, shard_bytes=1) as writer:
        writer.add("a", torch.ones(9))
        writer.add("b", torch.ones(9))
        assert list((tmp_path / ".out.partial").iterdir())
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("access", [1, 2])
def test_a_writer_that_fails_as_it_starts_leaves_nothing(tmp_path: Path, access: int) -> None:
    """It makes a directory, and opens it; no lock stays either."""
    fault = Fault(tmp_path, errno_of(errno.EIO), access, lasts=False)
    with injected(fault), pytest.raises(StorageError, match="Input/output error"):
        write(tmp_path / "out")
    assert fault.accesses >= access and list(tmp_path.iterdir()) == []
    write(tmp_path / "out")


def test_a_config_that_is_not_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"), CheckpointWriter(tmp_path / "out", {"x": float("inf")}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "part-00009").write_bytes(b"x" * 1000)
    write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_is_added_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="t was added before"), CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.add("t", torch.ones(1))
        writer.add("t", torch.ones(1))


@pytest.mark.parametrize("limit_bytes", [10, 300, 900])
def test_files_that_may_not_grow(tmp_path: Path, limit_bytes: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["save_tensors", "fsync_path"])
@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_at_any_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, call: int
) -> None:
    real, calls = getattr(writer_module, failing), iter(range(100))

    def full(*args: Any) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(writer_module, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out", shard_bytes=200)
    assert list(tmp_path.iterdir()) == []
