"""A layer's kernel is chosen by what was measured, and that is measured once for the same layer, machine and code."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from maskgen.core.pattern import NMPattern
from maskgen.core.registry import names
from sparse_serve import kernels
from sparse_serve.kernels import LinearSpec, cpu, supported
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning import selection
from sparse_serve.tuning.dispatch import Plan
from sparse_serve.tuning.measure import DENSE, Measurements
from sparse_serve.tuning.selection import Ask, choice_for

SPEC = LinearSpec(64, 32, NMPattern(2, 4), torch.float32, "cpu")


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[LinearSpec]]:
    """Every measurement that is made, each with an invented outcome; nothing is known at first."""
    if "cpu" not in supported(SPEC)[0]:
        pytest.skip(supported(SPEC)[1]["cpu"])
    run: list[LinearSpec] = []

    def measure(spec: LinearSpec, kernels: dict[str, object], tokens: tuple[int, ...], dense: object) -> Measurements:
        run.append(spec)
        return Measurements({count: {DENSE: 2.0, **dict.fromkeys(kernels, 1.0)} for count in tokens})

    monkeypatch.setattr(selection, "measure", measure)
    monkeypatch.setattr(selection, "_measured", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def forget() -> None:
    """What the process knows, as if it were another one."""
    selection._measured.clear()


def test_it_is_measured_once(measurements: list[LinearSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = choice_for(SPEC), choice_for(SPEC)
    forget()
    assert len(measurements) == 1
    assert first == second == choice_for(SPEC)
    assert len(measurements) == 1
    assert first.plan == Plan.of("cpu")
    assert {bucket.speedup for bucket in first.buckets} == {2.0}
    choice_for(SPEC, ask=Ask.AGAIN)
    choice_for(LinearSpec(64, 32, NMPattern(2, 4), torch.bfloat16, "cpu"))
    torch.set_num_threads(torch.get_num_threads() + 1)
    choice_for(SPEC)
    monkeypatch.setattr(selection.machine, "instructions", lambda: ["avx2"])
    choice_for(SPEC)
    assert len(measurements) == 5
    assert len(list((tmp_path / "cache" / "sparse-serve").rglob("*.json"))) == 4


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"seconds": 3}', "missing", "negative", "endless", "stranger"])
def test_a_cache_that_says_nothing_sensible_is_written_again(
    measurements: list[LinearSpec], tmp_path: Path, damage: str
) -> None:
    whole = choice_for(SPEC)
    (file,) = (tmp_path / "cache").rglob("*.json")
    stored = json.loads(file.read_text())
    if damage == "missing":
        del stored["seconds"]["16"]
    elif damage == "negative":
        stored["seconds"]["16"]["cpu"] = -1.0
    elif damage == "endless":
        stored["seconds"]["16"]["cpu"] = "inf"
    elif damage == "stranger":
        stored["seconds"]["16"]["gone"] = 1.0
    file.write_text(json.dumps(stored) if damage.isalpha() else damage)
    forget()
    assert choice_for(SPEC) == whole == choice_for(SPEC)
    assert len(measurements) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    measurements: list[LinearSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choice_for(SPEC).plan == choice_for(SPEC).plan == Plan.of("cpu")
    assert len(measurements) == 1, "a model has many layers of a kind"


def test_a_kernel_that_fails_when_measured_is_refused(
    measurements: list[LinearSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(spec: LinearSpec, kernels: dict[str, object], tokens: tuple[int, ...], dense: object) -> Measurements:
        return Measurements({count: {DENSE: 1.0} for count in tokens}, dict.fromkeys(kernels, "failed: out of luck"))

    monkeypatch.setattr(selection, "measure", failing)
    found = choice_for(SPEC)
    forget()
    assert found.plan == Plan.of("reference")
    assert found.unsupported["cpu"] == "failed: out of luck"
    run: list[LinearSpec] = []
    monkeypatch.setattr(selection, "measure", lambda spec, *rest: run.append(spec) or failing(spec, *rest))
    assert choice_for(SPEC) == choice_for(SPEC) == found
    assert run == [SPEC], "another process tries again, once: what failed may have been short of memory"
    assert found.is_last_resort and not choice_for(SPEC, "reference").is_last_resort


def test_who_asks_gets_figures_of_a_lone_kernel_too(measurements: list[LinearSpec]) -> None:
    lone = LinearSpec(64, 32, NMPattern(1, 4), torch.float16, "cpu")
    assert not choice_for(lone).buckets and not measurements
    assert {bucket.kernel for bucket in choice_for(lone, ask=Ask.ALWAYS).buckets} == {"reference"}
    assert measurements == [lone]


def test_a_kernel_asked_for_is_not_measured(measurements: list[LinearSpec]) -> None:
    assert choice_for(SPEC, "reference").plan == Plan.of("reference")
    every = r"cpu: pattern 1:4 is not 2:4, dtype torch.float64 is not one of"
    with pytest.raises(KernelError, match=every):
        choice_for(LinearSpec(64, 32, NMPattern(1, 4), torch.float64, "cpu", "fp8_e4m3"), "cpu")
    assert not measurements


def test_what_is_told_about_a_choice(measurements: list[LinearSpec]) -> None:
    text = str(choice_for(SPEC))
    assert text.startswith("64x32 2:4 float32 is served by cpu (tokens: kernel, speed against dense: 1: cpu 2.00x, 4:")
    lone = str(choice_for(LinearSpec(64, 32, NMPattern(1, 4), torch.float16, "cpu")))
    assert lone.startswith("64x32 1:4 float16 is served by reference (not measured")
    assert "unsupported: cpu: pattern 1:4 is not 2:4" in lone


def test_every_pattern_of_code_that_is_measured_matches() -> None:
    package = Path(selection.__file__).parents[1]
    found = selection.code_files()
    assert len(set(found)) == len(found) and all(file.is_file() for file in found)
    for pattern in selection.MEASURED_BY:
        assert set(package.glob(pattern)) <= set(found)
    assert {package / "kernels" / f"{name}.py" for name in names(kernels)} <= set(found)
    native = find_spec(cpu.LIBRARY)
    if native is None or native.origin is None:
        pytest.skip("the native library is not built")
    assert Path(native.origin) in found, "what is loaded is what is digested"


def test_what_times_depend_on_is_all_that_measuring_imports() -> None:
    """Every module of `tuning` that runs inside of `measure` is in MEASURED_BY, or old times would outlive it."""
    seen, todo = set(), ["sparse_serve.tuning.measure"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            tree = ast.parse(Path(str(find_spec(module).origin)).read_text("utf-8"))  # type: ignore[union-attr]
            froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            todo += [name for name in froms if name.startswith("sparse_serve.tuning.")]
    files = {f"tuning/{module.rpartition('.')[2]}.py" for module in seen}
    assert files == {pattern for pattern in selection.MEASURED_BY if pattern.startswith("tuning/")}


@pytest.mark.parametrize("gone", selection.MEASURED_BY)
def test_code_that_is_not_where_it_was_is_an_error(gone: str, tmp_path: Path) -> None:
    for pattern in selection.MEASURED_BY:
        file = tmp_path / pattern.replace("*", "some")
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (tmp_path / "kernels/readme.txt").touch()
    library = tmp_path / f"kernels/native{EXTENSION_SUFFIXES[0]}"
    library.touch()
    assert {file.name for file in selection.code_files(tmp_path)} == {
        "some.py", "measure.py", "samples.py", "timing.py", "dense.py", library.name
    }  # fmt: skip
    (tmp_path / gone.replace("*", "some")).unlink()
    with pytest.raises(KernelError, match=rf"{re.escape(str(tmp_path / gone))}: no such file.*MEASURED_BY"):
        selection.code_files(tmp_path)
