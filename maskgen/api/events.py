"""What the functions of `maskgen` tell of their progress: one event after another, given to a callback.

Every event is a small frozen dataclass. A callback that is interested in some of them looks at their types:

    def show(event):
        if isinstance(event, maskgen.TrainingStep):
            print(event.step, event.loss)

A callback is called in the process and the thread that does the work; what it raises stops the work, which goes on
from there when it is asked for again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maskgen.hf.planning import Planned
from maskgen.sweep.report import Progress as SweepProgress
from maskgen.train.loop import HeldOut, Stage
from maskgen.train.step import TrainingStep

__all__ = ["Event", "HeldOut", "Listener", "Planned", "Scored", "Stage", "SweepProgress", "TrainingStep", "silent"]


@dataclass(frozen=True)
class Scored:
    """`done` of `windows` windows of text have their perplexity."""

    done: int
    windows: int


Event = Planned | Stage | SweepProgress | TrainingStep | HeldOut | Scored
"""
`Planned`        it is settled what will be pruned
`Stage`          something begins: converting a file, loading the model, a prior, training, writing
`SweepProgress`  a layer or a block of a one-shot run is done
`TrainingStep`   an optimiser step is done
`HeldOut`        the masks of now were evaluated on held-out text
`Scored`         windows of an evaluation are done
"""

Listener = Callable[[Event], None]
"""What a caller passes to hear of progress."""


def silent(event: Event) -> None:
    """The default: nothing is shown."""
