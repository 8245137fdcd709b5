"""Every verb under every accident: exit 2 (130 for Ctrl-C) with one line that names the thing, nothing half-written.

`CASES` has the arguments of each verb, with places for what it reads and writes; what goes wrong is the same for all.
What takes an engine, vLLM or minutes is replaced here by its result: kernels, servers and measurements.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from maskgen.core.checkpoint import SparseCheckpoint
from sparse_serve.bench import kernels, serve, survey
from sparse_serve.cli import main as cli
from sparse_serve.engine.vllm_engine import VllmEngine
from sparse_serve.gate import runner
from sparse_serve.gate.verdict import Verdict
from tests.directories import TARGETS, sparse_dir
from tests.faults import Fault, closed_pipe, errno_of, injected
from tests.sparse_serve.bench.test_bench import results
from tests.sparse_serve.bench.test_serve import REPORT
from tests.sparse_serve.gate.test_report import report


@dataclass(frozen=True)
class Case:
    """A verb's arguments, for the folder of places; models it reads there; what it makes; how it ends undisturbed."""

    argv: Callable[[Path], list[object]]
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    status: int = 0


CASES = {
    "serve": Case(lambda at: [at / "sparse", "--verbose", "--http-port=0", "--grpc-port=0"], ("sparse",), (), 2),
    "generate": Case(lambda at: ["--address", "127.0.0.1:1", "--timeout-s", 5, "hello"], (), (), 2),
    "bench kernels": Case(
        lambda at: ["--shapes", "10x10", "--tokens", "1,4", "--json", at / "made/k.json", "--plot", at / "made/k.svg"],
        (),
        ("k.json", "k.svg"),
    ),
    "bench serve": Case(
        lambda at: ["--dense", at / "sparse-dense", "--sparse", at / "sparse", "--json", at / "made/s.json"],
        ("sparse", "sparse-dense"),
        ("s.json",),
    ),
    "tune": Case(lambda at: [at / "sparse"], ("sparse",)),
    "doctor": Case(lambda at: [at / "sparse"], ("sparse",)),
    "gate": Case(
        lambda at: ["--dense", at / "sparse-dense", "--sparse", at / "sparse", "--data", at / "text.txt",
                    "--window", 16, "--out", at / "made/gate"],
        ("sparse", "sparse-dense"),
        ("gate",),
    ),
}  # fmt: skip
WRITERS = [verb for verb, case in CASES.items() if case.makes]
READERS = [verb for verb, case in CASES.items() if case.reads]
PRINTERS = [verb for verb, case in CASES.items() if case.status == 0]


@contextmanager
def no_server(*args: Any) -> Iterator[str]:
    yield "http://127.0.0.1:1"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What verbs read; and verbs without what takes vLLM or minutes."""
    at = tmp_path / "places"
    at.mkdir()
    sparse_dir(at / "sparse")
    (at / "text.txt").write_text("text")
    layers = SimpleNamespace(sparse={name: [name] for name in TARGETS}, dense={"lm_head": "outside"})
    monkeypatch.setattr(survey, "_served_layers", lambda checkpoint: layers)
    monkeypatch.setattr(survey, "_choices", lambda *args: [])
    monkeypatch.setattr(survey, "memory_of", lambda *args: survey.Memory(9, 16))
    monkeypatch.setattr(kernels, "run", lambda *args: results())
    monkeypatch.setattr(serve, "serving", no_server)
    monkeypatch.setattr(serve, "bench_serve", lambda *args: REPORT)
    monkeypatch.setattr(runner, "run", lambda *args, **options: report(Verdict.PASS))
    monkeypatch.setattr(VllmEngine, "_load", lambda engine: SparseCheckpoint.open(engine._command[0]))
    return at


def test_every_verb_has_its_case() -> None:
    """But vLLM's own command line, whose errors are vLLM's."""
    assert {verb.partition(" ")[0] for verb in CASES} == set(cli._VERBS) - {cli._VLLMS}


def run(verb: str, places: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:  # a process has one server, and its metrics one registry
        patch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry())
        return cli.main([*verb.split(), *map(str, CASES[verb].argv(places))])


def attempt(verb: str, places: Path, capsys: pytest.CaptureFixture[str], fault: Fault | None = None) -> tuple[int, str]:
    """Run a verb; its exit status, and the one line of its error. Whatever happened, nothing is left half-written."""
    if fault is None:
        code = run(verb, places)
    else:
        with injected(fault):
            code = run(verb, places)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if "error:" in line or "Traceback" in line]
    if code in (2, 3):
        assert (code == 3) <= (verb == "gate"), "a gate that could not keep its report is an error, not wrong usage"
        assert errors == lines[-1:] and lines[-1].startswith("sparse-serve: error: "), lines
    else:
        assert code in (0, 130) and not errors
    made = list((places / "made").rglob("*"))
    assert not [path for path in made if path.name.endswith(".partial")]
    assert {path.relative_to(places / "made").parts[0] for path in made} <= set(CASES[verb].makes)
    return code, "".join(errors)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def loop(path: Path) -> None:
    """What cannot be opened, by root neither, nor by a library."""
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("damage", [cut, Path.unlink, loop])
@pytest.mark.parametrize("verb", READERS)
def test_any_file_may_be_damaged(
    verb: str, damage: Callable[[Path], None], places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, each file that is needed of the models that the verb reads."""
    for model in CASES[verb].reads:
        for name in ("model.safetensors", "config.json"):
            path = places / model / name
            kept = path.read_bytes()
            damage(path)
            code, line = attempt(verb, places, capsys)
            assert code == 2 and name in line, line
            path.unlink(missing_ok=True)
            path.write_bytes(kept)


ACCIDENTS: dict[str, Callable[[str], BaseException]] = {
    "the disk fails": errno_of(errno.EIO),
    "no permission": errno_of(errno.EACCES),
    "out of memory": lambda path: MemoryError(),
    "Ctrl-C": lambda path: KeyboardInterrupt(),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.parametrize("verb", [verb for verb in READERS if verb != "serve"])
def test_any_access_to_a_file_may_fail(
    verb: str, accident: str, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all that the verb makes of files."""
    counted = Fault(places, ACCIDENTS[accident])
    assert attempt(verb, places, capsys, counted) == (0, "") and counted.accesses >= 3
    for number in range(1, counted.accesses + 1):
        shutil.rmtree(places / "made", ignore_errors=True)
        code, line = attempt(verb, places, capsys, Fault(places, ACCIDENTS[accident], number, lasts=False))
        if accident == "Ctrl-C":
            assert code == 130
        elif accident == "out of memory":
            assert code in (2, 3) and accident in line
        elif code:
            assert "Input/output error" in line or "Permission denied" in line


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written(
    verb: str, number: int, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "made").mkdir()
    code, line = attempt(verb, places, capsys, Fault(places / "made", errno_of(number), 1, writes=True))
    assert code == (3 if verb == "gate" else 2) and os.strerror(number) in line and str(places / "made") in line
    assert [path for path in (places / "made").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("verb", PRINTERS)
@pytest.mark.parametrize("stream", ["closed", "full"])
def test_a_standard_output_that_takes_nothing(
    verb: str, stream: str, places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_pipe() if stream == "closed" else Path("/dev/full").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        try:
            code = run(verb, places)
        except SystemExit as end:  # rich ends a process whose output nobody reads
            code = int(str(end.code))
        monkeypatch.undo()
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    if stream == "closed":
        assert code in (1, 141) and errors == []
    else:
        assert code == (3 if verb == "gate" else 2)
        assert len(errors) == 1 and "No space left on device" in errors[0]
    for name in CASES[verb].makes:  # it has measured for minutes by then
        assert (places / "made" / name).exists()


@pytest.mark.parametrize("verb", WRITERS)
def test_what_cannot_be_written_is_told_before_anything_is_measured(
    verb: str, places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (runner, kernels, serve):
        monkeypatch.setattr(module, "run", lambda *args, **options: pytest.fail("measured"))
    (places / "made").touch()
    code = run(verb, places)
    line = capsys.readouterr().err
    assert code == 2 and "made is not a directory; choose another place" in line and line.count("\n") == 1


def test_a_report_that_cannot_be_written_is_printed(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with injected(Fault(places / "made", errno_of(errno.ENOSPC), 1, writes=True)):
        assert run("gate", places) == 3
    assert "# Gate: PASS" in capsys.readouterr().out


def test_no_report_of_an_earlier_run_stays_when_this_one_cannot_be_written(places: Path) -> None:
    assert run("gate", places) == 0
    for first in range(1, 5):
        with injected(Fault(places / "made", errno_of(errno.ENOSPC), first, writes=True)):
            assert run("gate", places) == 3
        assert list((places / "made").rglob("*.*")) == [], "neither an old verdict, nor half of the new"
