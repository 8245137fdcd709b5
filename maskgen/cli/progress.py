"""How a run of `maskgen` shows what it is doing: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from maskgen.api.events import Event, HeldOut, Listener, Planned, Scored, Stage, SweepProgress, TrainingStep
from maskgen.cli.kept import print_planned

LOG_EVERY_S = 10.0
"""Seconds between progress lines where there is no terminal."""


def megabytes(size_bytes: int) -> str:
    """For people: `1,234.5 MB`."""
    return f"{size_bytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """For people: `1:02:03`, or `2:03` below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


@contextmanager
def shown_progress() -> Iterator[Listener]:
    """A callback that shows events on stderr: as a bar, or as log lines where that is no terminal.

    Nothing is drawn before the first event, so a process that is told of none draws nothing.
    """
    with ExitStack() as drawn:
        shown: list[Shown] = []

        def show(event: Event) -> None:
            if isinstance(event, Planned):
                print_planned(event)  # the first event, before anything is drawn
                return
            if not shown:
                shown.append(Shown(drawn.enter_context(_bar())))
            shown[0].show(event)

        yield show


@contextmanager
def _bar() -> Iterator[ProgressBar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(file=sys.stderr)  # this one, also while a library's own bar is kept from it
    if console.is_terminal:
        with ProgressBar(*columns, console=console, transient=True) as bar:
            yield bar
    else:
        yield _LogLines(console)


class _LogLines(ProgressBar):
    """For logs, where a bar that redraws itself shows nothing: now and then a line, and one for each new stage of a
    command that has been at work for a while."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self.began_s = self.said_s = time.monotonic()
        self.stage = ""

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        kind, _, _ = description.partition(" ")  # of "wrote 64 texts of 128" one line is enough for a while
        if kind != self.stage and time.monotonic() - self.began_s >= LOG_EVERY_S:
            self._say(description)
        self.stage = kind
        return super().add_task(description, *args, **kwargs)

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        if time.monotonic() - self.said_s >= LOG_EVERY_S:
            task = next(task for task in self.tasks if task.id == task_id)
            total = "" if task.total is None else f" {task.completed:g}/{task.total:g}"
            line = f"{task.description}{total} {task.fields.get('note', '')}"
            self._say(line)

    def _say(self, line: str) -> None:
        self.said_s = time.monotonic()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Shown:
    """One bar, and what was seen so far: where the loss is, where the masks are, how long it will take."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar, self.task = bar, bar.add_task("loading", total=None, note="")
        self.prefix = ""
        self.look: HeldOut | None = None
        self.began: TrainingStep | None = None

    def show(self, event: Event) -> None:
        """Move the bar."""
        if isinstance(event, Stage):
            self.prefix = f"{event.name}: " if event.name in ("prior", "budget") else ""
            self.bar.remove_task(self.task)  # a task that has a total keeps one
            self.task = self.bar.add_task(event.name, total=None, note="")
        elif isinstance(event, SweepProgress):
            what = f"{self.prefix}block {event.block + 1}/{event.blocks}"
            note = f"{event.what}  peak memory {megabytes(event.peak_rss_bytes)}"
            self._update(what, event.block, event.blocks, note)
        elif isinstance(event, TrainingStep):
            self._update("training", event.step, event.steps, self._training(event))
        elif isinstance(event, HeldOut):
            self.look = event
            self.bar.update(self.task, note=f"held-out perplexity {event.perplexity:.2f}")
        elif isinstance(event, Scored):
            self._update("scoring", event.done, event.windows, "")

    def _training(self, log: TrainingStep) -> str:
        began = self.began = self.began or log
        step_s = (log.elapsed_s - began.elapsed_s) / max(1, log.step - began.step)
        parts = [f"loss {log.loss:.3f}"]
        if self.look is not None:
            look = self.look
            parts.append(f"held-out {look.perplexity:.2f}, same {look.agreement:.1%}, flipped {look.flipped:.2%}")
        if step_s:
            parts.append(f"{log.tokens / step_s:,.0f} tokens/s")
            parts.append(f"{duration((log.steps - log.step) * step_s)} to go")
        return "  ".join([*parts, megabytes(log.peak_memory_bytes)])

    def _update(self, what: str, done: int, total: int, note: str) -> None:
        self.bar.update(self.task, description=what, completed=done, total=total, note=note)
