"""Held-out perplexity of a one-shot run: of the dense model before it is pruned in place, and of what came out.

That is for people and decides nothing, so a model that cannot be measured is pruned all the same: where there is no
number, there is the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from maskgen.api.events import Listener, Scored, Stage
from maskgen.core.errors import ModelError, NumericalError, OutOfMemoryError
from maskgen.core.failures import explained
from maskgen.core.quality import Quality
from maskgen.hf.pruning_cost import Baseline, HeldOutText, placed, quality_of

NO_TEXT = "no text was given; with `data`, held-out perplexity of the dense and the pruned model is measured, too"
SHORT_TEXT = "the text is too short to hold any of it out; give more with `data`"


def measure_dense(
    model: nn.Module, blocks: Sequence[nn.Module], text: HeldOutText | str, device: str, progress: Listener
) -> Baseline | str:
    """What is needed of the dense model, or why there is none."""
    if isinstance(text, str):
        return text
    progress(Stage("measuring"))
    try:
        with explained(), placed(model, device):
            return Baseline.record(model, blocks, text, _telling(progress))
    except (ModelError, OutOfMemoryError) as error:
        return str(error)


def measure_pruned(
    model: nn.Module, before: Baseline | str, method: str, pattern: str, device: str, progress: Listener
) -> Quality | str:
    """The comparison of the model, pruned by now, with what it was, or why there is none."""
    if isinstance(before, str):
        return before
    progress(Stage("measuring"))
    try:
        with explained(), placed(model, device):
            return quality_of(before.compare(model, _telling(progress)), before.text, method, pattern)
    except (NumericalError, OutOfMemoryError) as error:
        return str(error)


def _telling(progress: Listener) -> Callable[[int, int], None]:
    return lambda done, windows: progress(Scored(done, windows))
