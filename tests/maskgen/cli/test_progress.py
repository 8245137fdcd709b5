"""What a person sees of a run: lines where there is no terminal, not too many, and numbers that can be read."""

from __future__ import annotations

import dataclasses

import pytest
from rich.progress import Progress

from maskgen.api.events import HeldOut, Scored, Stage, SweepProgress, TrainingStep
from maskgen.cli import progress

STEP = TrainingStep(1, 11, 3.25, 3.0, 0.5, 1.0, 1e-3, 4096, 10.0, 700_000_000)
LOOK = HeldOut(0, 4.0, 54.598, 1.0, 0.0, 0.5, 3.9, 49.402)


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress, "LOG_EVERY_S", 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with progress.shown_progress() as show:
        show(Stage("loading"))
        show(Stage("scoring"))
        for done in range(1, 51):
            show(Scored(done, 50))
            now_s += 1.0
        show(Stage("writing"))
        for texts in (64, 128):
            show(Stage(f"wrote {texts} texts of 128"))
    first = "wrote 64 texts of 128"
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in lines] == [*(f"scoring {done}/50" for done in (11, 21, 31, 41)), "writing", first]


def test_nothing_is_drawn_without_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown_progress():
        pass
    assert capsys.readouterr() == ("", "")


def test_every_event_is_shown() -> None:
    shown = progress.Shown(Progress(disable=True))

    def look() -> tuple[str, float, float | None, str]:
        (task,) = shown.bar.tasks
        return task.description, task.completed, task.total, task.fields["note"]

    assert look() == ("loading", 0, None, "")
    shown.show(Stage("prior"))
    shown.show(SweepProgress(1, 3, "up_proj", 2.0, 5_000_000))
    assert look() == ("prior: block 2/3", 1, 3, "up_proj  peak memory 5.0 MB")
    shown.show(Stage("loading"))
    assert look() == ("loading", 0, None, "")
    shown.show(SweepProgress(0, 3, "up_proj", 2.0, 5_000_000))
    assert look()[0] == "block 1/3"
    shown.show(Scored(2, 7))
    assert look() == ("scoring", 2, 7, "")


def test_training_shows_loss_masks_speed_and_time_to_go() -> None:
    shown = progress.Shown(Progress(disable=True))
    (task,) = shown.bar.tasks
    shown.show(LOOK)
    assert task.fields["note"] == "held-out perplexity 54.60"
    shown.show(STEP)
    assert task.fields["note"] == "loss 3.250  held-out 54.60, same 100.0%, flipped 0.00%  700.0 MB"
    shown.show(dataclasses.replace(STEP, step=2, elapsed_s=12.0))
    shown.show(dataclasses.replace(LOOK, step=2, perplexity=50.0, agreement=0.923, flipped=0.0456, dense_nll=None))
    shown.show(dataclasses.replace(STEP, step=3, elapsed_s=14.0))
    assert (task.description, task.completed, task.total) == ("training", 3, 11)
    assert task.fields["note"] == (
        "loss 3.250  held-out 50.00, same 92.3%, flipped 4.56%  2,048 tokens/s  0:16 to go  700.0 MB"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3600, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
