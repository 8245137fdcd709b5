"""Which kernels are chosen from what was measured, and that it is measured once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskgen.core.pattern import NMPattern
from sparse_serve.kernels import LinearSpec, supported
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning import selection
from sparse_serve.tuning.dispatch import Plan
from sparse_serve.tuning.measure import DENSE, Measurements
from sparse_serve.tuning.selection import BUCKETS, SLACK, Ask, Bucket, choice_for, decide, plan_of

SPEC = LinearSpec(64, 32, NMPattern(2, 4), torch.float32, "cpu")


def seconds(**times: list[float]) -> dict[int, dict[str, float]]:
    return {tokens: {name: each[at] for name, each in times.items()} for at, tokens in enumerate((1, 16, 256))}


def test_a_kernel_that_keeps_up_everywhere_beats_a_faster_one_that_does_not() -> None:
    buckets = decide(seconds(dense=[1, 1, 1], steady=[0.9, 0.9, 0.99], wild=[0.1, 0.1, 1.2]))
    assert buckets == (
        Bucket(1, "steady", 0.9, 1 / 0.9),
        Bucket(16, "steady", 0.9, 1 / 0.9),
        Bucket(256, "steady", 0.99, 1 / 0.99),
    )


def test_of_those_that_keep_up_the_fastest_on_the_whole_is_taken_alone() -> None:
    found = decide(seconds(dense=[1, 1, 1], few=[0.5, 0.5, 1.04], many=[0.9, 0.9, 0.8]))
    assert {bucket.kernel for bucket in found} == {"few"}, "a second layout would cost memory, and nothing needs it"


def test_two_kernels_where_no_one_keeps_up() -> None:
    found = decide(seconds(dense=[1, 1, 1], few=[0.5, 0.6, 3], many=[2, 0.9, 0.7], none=[9, 9, 9]))
    assert [bucket.kernel for bucket in found] == ["few", "few", "many"]
    assert str(plan_of(found)) == "16=few,*=many"


def test_the_least_bad_where_all_are_slower() -> None:
    found = decide(seconds(dense=[1, 1, 1], slow=[2, 2, 2], slower=[3, 3, 1.99]))
    assert {bucket.kernel for bucket in found} == {"slow"}, "a hundredth is no reason for a second layout"
    assert selection.Choice(SPEC, plan_of(found), found).slower == [1, 16, 256]


times = st.floats(1e-6, 1.0)


@given(st.lists(st.tuples(times, times, times, times), min_size=len(BUCKETS), max_size=len(BUCKETS)))
def test_never_behind_a_single_kernel_where_it_matters(rows: list[tuple[float, float, float, float]]) -> None:
    measured = {
        tokens: dict(zip((DENSE, "a", "b", "c"), row, strict=True)) for tokens, row in zip(BUCKETS, rows, strict=True)
    }
    worst = max(1 / bucket.speedup for bucket in decide(measured))
    for name in "abc":
        alone = max(row[name] / row[DENSE] for row in measured.values())
        assert worst <= max(SLACK, alone) * (1 + 1e-9)


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
    assert found.refused["cpu"] == "failed: out of luck"
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
    assert "refused: cpu: pattern 1:4 is not 2:4" in lone
