"""`--minutes`: as many steps as fit, found once; the recipe beside the result gives the same bits without a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskgen.core.errors import RecipeError
from maskgen.methods.learned.adaptive_sparse import AdaptiveSparse
from maskgen.recipes.recipe import RECIPE_FILE
from maskgen.recipes.sections import Training
from maskgen.sweep.report import BLOCK_DONE, Progress
from maskgen.train import budget as budget_module
from maskgen.train import run as learn
from maskgen.train import step as step_module
from maskgen.train.budget import MIN_STEPS, STEPS_FILE, Budget, passes_s
from maskgen.train.log import LOG_FILE, read
from maskgen.train.loop import Cadence
from tests.maskgen.cli.test_parser import run
from tests.maskgen.training import assert_same, corpus, session, state

ModelDir = Callable[..., Path]

SHORT = [
    *("--set", "train.batch=4", "--set", "train.window_tokens=16", "--set", "train.heldout_windows=5"),
    *("--set", "train.dtype=float32", "--set", "calibration.samples=6", "--set", "calibration.window_tokens=16"),
]
SPEC = Training(batch=8, heldout_windows=24)
SLOW = (0.0, 200.0)
"""Times of passes that leave room for about a dozen steps in an hour."""


def words(name: str, dense: Path, text: Path, out: Path, *flags: object) -> list[Any]:
    return ["run", name, "--model", dense, "--data", text, "--out", out, *SHORT, *flags]


def stop(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 seconds after the beginning."""
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: 1100.0)


@pytest.mark.usefixtures("clock")
def test_steps_looks_and_writing_fit_into_what_is_left() -> None:
    steps = Budget(60, 1000.0).steps((50.0, 2.0), SPEC, Cadence())
    look_s = 2.0 / 3 * 24 / 8
    used_s = 10 + 100 + 50 + 9 * look_s + steps * 2.0 * 1.1
    assert 0.95 * 3600 - 2.2 < used_s <= 0.95 * 3600
    assert Budget(120, 1000.0).steps((50.0, 2.0), SPEC, Cadence()) > 2 * steps, "what is spent once is spent once"
    assert Budget(60, 1000.0).steps((50.0, 2.0), SPEC, Cadence(eval_every=1)) < 0.6 * steps


@pytest.mark.usefixtures("clock")
def test_too_short_a_time_says_how_long_it_must_be() -> None:
    with pytest.raises(RecipeError, match=r"`minutes` 2: 1\.7 minutes passed .* a step takes 6 s; give ") as refused:
        Budget(2, 1000.0).steps((0.0, 6.0), SPEC, Cadence())
    needed = float(str(refused.value).rpartition("give ")[2].partition(" minutes")[0])
    assert Budget(needed, 1000.0).steps((0.0, 6.0), SPEC, Cadence()) >= MIN_STEPS
    with pytest.raises(RecipeError, match="minutes or more"):
        Budget(needed - 0.5, 1000.0).steps((0.0, 6.0), SPEC, Cadence())


@pytest.mark.usefixtures("clock")
def test_a_prior_that_leaves_no_time_is_told_of_after_two_blocks() -> None:
    def block_done(block: int, elapsed_s: float) -> Progress:
        return Progress(block, 30, BLOCK_DONE, elapsed_s, 0)

    slow = Budget(5, 1000.0)
    slow.check_prior(block_done(0, 20.0))
    slow.check_prior(Progress(1, 30, "calibration inputs", 40.0, 0))
    slow.check_prior(block_done(29, 100.0))
    with pytest.raises(RecipeError, match=r"`minutes` 5: making the prior alone takes about 11\.0 minutes"):
        slow.check_prior(block_done(1, 40.0))
    Budget(12, 1000.0).check_prior(block_done(1, 40.0))


def test_timing_changes_nothing() -> None:
    timed, left_alone = (session(AdaptiveSparse(), steps=5, lr=1e-2, distill_weight=0.5) for _ in range(2))
    first_s, later_s = passes_s(timed, corpus(), 2)
    assert first_s > 0 and later_s > 0 and timed.step == 0
    assert all(parameter.grad is None for parameter in timed.parameters)
    assert_same(state(timed), state(left_alone))
    for each in (timed, left_alone):
        each.run_step(corpus(), 2)
    assert_same(state(timed), state(left_alone))


@pytest.mark.parametrize("name", ["best-effort", "maskllm"])
def test_the_number_of_steps_repeats_the_result(
    name: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learn, "passes_s", lambda *args: passes_s(*args) and SLOW)
    timed, counted = tmp_path / "timed", tmp_path / "counted"
    assert run(capsys, *words(name, model_dir(), text_file, timed, "--minutes", "60"))[0] == 0
    steps = json.loads((timed / RECIPE_FILE).read_text())["train"]["steps"]
    assert 8 <= steps <= 12 and read(timed / LOG_FILE)[-1]["step"] == steps
    monkeypatch.setattr(learn, "passes_s", stop)
    argv = words(name, model_dir(), text_file, counted, "--set", f"train.steps={steps}")
    assert run(capsys, *argv)[0] == 0
    one, other = ({path.name: path.read_bytes() for path in out.iterdir()} for out in (timed, counted))
    assert one.keys() == other.keys() and [file for file in one if one[file] != other[file]] == [LOG_FILE]
    assert not (tmp_path / "timed.work").exists()


@pytest.mark.parametrize(("compiled_s", "expected"), [(100.0, range(24, 28)), (240.0, range(10, 13))])
def test_a_run_that_is_long_enough_is_timed_compiled(
    compiled_s: float,
    expected: range,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless so few steps fit then that a run of that many would not be compiled."""
    times, compiled = iter([SLOW, (0.0, compiled_s)]), []
    monkeypatch.setattr(learn, "passes_s", lambda *_: next(times))
    monkeypatch.setattr(learn, "pays", lambda weights, spec, *_: 10 <= spec.steps < 100)
    monkeypatch.setattr(learn, "compile_session", lambda *_: compiled.append(1))
    argv = words("adaptive_sparse", model_dir(), text_file, tmp_path / "out", "--minutes", "60")
    assert run(capsys, *argv)[0::2] == (0, "")
    assert read(tmp_path / "out" / LOG_FILE)[-1]["step"] in expected and len(compiled) == 2


@pytest.mark.parametrize("moment", ["before it is timed", "in the training"])
def test_a_stopped_run_keeps_its_steps(
    moment: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    argv = words("adaptive_sparse", model_dir(), text_file, out, "--minutes", "60", "--checkpoint-every", "1")
    step = step_module.Session.run_step
    monkeypatch.setattr(learn, "passes_s", lambda *_: SLOW)
    with monkeypatch.context() as patch:
        if moment == "in the training":
            patch.setattr(step_module.Session, "run_step", lambda own, *a: stop() if own.step == 2 else step(own, *a))
        else:
            patch.setattr(learn, "passes_s", stop)
        assert run(capsys, *argv)[0] == 130
    assert (work / STEPS_FILE).exists() == (moment == "in the training")
    if moment == "in the training":
        monkeypatch.setattr(learn, "passes_s", stop)
        other = words("adaptive_sparse", model_dir(), text_file, out, "--minutes", "90")
        code, _, errors = run(capsys, *other)
        assert code == 2 and "--minutes 90: " in errors and "steps for 60 minutes; give these to go on" in errors
        kept = (work / STEPS_FILE).read_text()
        (work / STEPS_FILE).write_text('{"minutes": 60, "steps": "12"}')
        code, _, errors = run(capsys, *argv)
        assert code == 2 and f"{STEPS_FILE}: damaged; delete" in errors and errors.count("\n") == 1
        (work / STEPS_FILE).write_text(kept)
    assert run(capsys, *argv)[0] == 0
    records = read(out / LOG_FILE)
    steps = records[0]["recipe"]["train"]["steps"]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, steps + 1))


def test_what_was_too_short_goes_on_with_more(
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prior that took most of the time is not made again."""
    monkeypatch.setattr(learn, "passes_s", lambda *_: SLOW)
    argv = words("best-effort", model_dir(), text_file, tmp_path / "out")
    code, _, errors = run(capsys, *argv, "--minutes", "5")
    assert code == 2 and errors.startswith("maskgen: error: --minutes 5: ") and errors.count("\n") == 1
    start = tmp_path / "out.work" / "start" / "model.safetensors"
    before = start.stat().st_mtime_ns
    assert run(capsys, *argv, "--minutes", "60", "--keep-work")[0] == 0 and start.stat().st_mtime_ns == before


def test_a_finished_run_is_known_whatever_its_steps(
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learn, "passes_s", lambda *_: SLOW)
    argv = words("adaptive_sparse", model_dir(), text_file, tmp_path / "out", "--minutes", "60")
    assert run(capsys, *argv, "--keep-work")[0] == 0
    (tmp_path / "out.work" / "kept").unlink()
    code, said, _ = run(capsys, *argv)
    assert code == 0 and "is finished" in said and not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["magnitude", "--minutes", "5"], "--minutes: magnitude is a one-shot method and does not train; leave it out"),
        (["adaptive_sparse", "--minutes", "5", "--set", "train.steps=9"], "--minutes 5: steps follow from the time"),
        (["adaptive_sparse", "--minutes", "0"], "--minutes 0.0: input should be greater than 0"),
        (["adaptive_sparse", "--minutes", "nan"], "--minutes nan: input should be"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    argv: list[str],
    message: str,
    model_dir: ModelDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *flags = argv
    given = ["--model", model_dir(), "--data", text_file, "--out", tmp_path / "out"]
    code, _, errors = run(capsys, "run", name, *given, *flags)
    assert code == 2 and errors.startswith("maskgen: error: ") and errors.count("\n") == 1
    assert message in errors and not list(tmp_path.iterdir())
