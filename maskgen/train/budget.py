"""How many steps fit into a time (`--minutes`): forward and backward passes are timed once, and steps follow from that.

The number is kept in OUT.work, so that a run that goes on has the schedule it began with, and it takes the place of the
recipe's `train.steps`: the recipe beside the result has it, and gives the same bits without a time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from maskgen.core.errors import FormatError, RecipeError
from maskgen.core.files import read_json, write_json
from maskgen.data.corpus import Corpus
from maskgen.recipes.recipe import Recipe
from maskgen.recipes.sections import Training
from maskgen.sweep.report import BLOCK_DONE, Progress
from maskgen.train.loop import EVALUATIONS, Cadence
from maskgen.train.step import Session

STEPS_FILE = "steps.json"
"""In OUT.work: the minutes that were asked for, and the steps that fit into them."""

MIN_STEPS = 8
"""Fewer are no training."""

_OVERHEAD = 1.1
"""A step by its forward and backward passes: the update, new masks and the log are the rest."""

_MARGIN = 0.05
"""Share of the time for writing the result."""

_OUTSIDE_S = 10.0
"""What no clock here sees, or only too late: Python's start, and loading the model that is trained."""

_BLOCKS_TO_JUDGE = 2
"""Of a prior: after so many, how long all of them take is told from how long these took."""

_OTHER_LOOKS = 4
"""Passes over the held-out windows beside the looks during training: before it and after it, each at two models."""


@dataclass(frozen=True)
class Budget:
    """The time that a run may take, from `began_s` (of `time.monotonic`) to its result."""

    minutes: float
    began_s: float

    def stored(self, work: Path) -> str:
        """The number of steps found earlier, as digits; "" if none was. Raises `FormatError`, and `RecipeError` if it
        was found for another time."""
        file = work / STEPS_FILE
        if not file.exists():
            return ""
        found = read_json(file)
        if found.keys() != {"minutes", "steps"} or type(found["steps"]) is not int or found["steps"] < 1:
            raise FormatError(f"{file}: damaged; delete {work} to start over")
        if found["minutes"] != self.minutes:
            raise RecipeError(
                f"`minutes` {self.minutes:g}: {work} holds a run of {found['steps']} steps for {found['minutes']:g} "
                "minutes; give these to go on with it, or delete it to start over"
            )
        return str(found["steps"])

    def store(self, work: Path, steps: int) -> str:
        """Keep the number of steps; returns it as digits."""
        write_json(work / STEPS_FILE, {"minutes": self.minutes, "steps": steps})
        return str(steps)

    def check_prior(self, event: Progress) -> None:
        """Raise `RecipeError` if making the prior, which has come as far as `event` says, takes the whole time.

        That is told after its first blocks, not after its last: what they made stays in OUT.work.
        """
        done = event.block + 1
        if event.what != BLOCK_DONE or done < min(_BLOCKS_TO_JUDGE, event.blocks):
            return
        left_s = event.elapsed_s / done * (event.blocks - done)
        needed_s = time.monotonic() - self.began_s + left_s
        if needed_s > (1 - _MARGIN) * 60 * self.minutes:
            raise RecipeError(
                f"`minutes` {self.minutes:g}: making the prior alone takes about {needed_s / 60:.1f} minutes here; "
                "give more than that, a prior that is made already (`prior`), or a lower calibration.samples"
            )

    def steps(self, times_s: tuple[float, float], spec: Training, cadence: Cadence) -> int:
        """How many steps fit into the time that is left, by the times of `passes_s`.

        Raises `RecipeError` when these are fewer than `MIN_STEPS`.
        """
        passed_s = time.monotonic() - self.began_s
        first_s, step_s = times_s
        look_s = step_s / 3 * spec.heldout_windows / spec.batch  # no backward pass, which takes two thirds
        each_s = _OVERHEAD * step_s + (look_s / cadence.eval_every if cadence.eval_every else 0.0)
        fixed_s = _OUTSIDE_S + passed_s + first_s + look_s * (_OTHER_LOOKS + (0 if cadence.eval_every else EVALUATIONS))
        steps = int(((1 - _MARGIN) * 60 * self.minutes - fixed_s) / each_s)
        if steps < MIN_STEPS:
            needed = math.ceil(10 * (fixed_s + (MIN_STEPS + 1) * each_s) / (1 - _MARGIN) / 60) / 10
            raise RecipeError(
                f"`minutes` {self.minutes:g}: {passed_s / 60:.1f} minutes passed before training (the prior, if there "
                f"is one), and a step takes {step_s:.2g} s; give {needed:g} minutes or more"
            )
        return steps


def any_steps(recipe: Recipe) -> Recipe:
    """The recipe with a number of steps that stands for every number: what a run with a time is known by."""
    return with_steps(recipe, 1)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of training steps."""
    assert recipe.train is not None
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def passes_s(session: Session, corpus: Corpus, micro_batch: int) -> tuple[float, float]:
    """Seconds that the forward and backward passes of a step take the first time, when they may compile, and later: the
    mean of two. Nothing that is learned changes."""
    times_s = []
    for _ in range(3):
        began_s = time.perf_counter()
        session.passes(corpus, micro_batch)
        session.optimizer.zero_grad(set_to_none=True)
        times_s.append(time.perf_counter() - began_s)
    return times_s[0], sum(times_s[1:]) / 2
