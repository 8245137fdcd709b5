"""Held-out perplexity of a learned run: of the model as it is written, against the dense one.

The windows are the corpus' held-out ones, fewer and shorter where there are many, so that it takes a CPU seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskgen.core.errors import ModelError, NumericalError
from maskgen.core.quality import Quality
from maskgen.data.corpus import Corpus
from maskgen.data.heldout import WINDOW_TOKENS, WINDOWS
from maskgen.hf import model
from maskgen.hf.evaluate import measure
from maskgen.hf.logits import Logits, logits_of
from maskgen.hf.pruning_cost import HeldOutText, quality_of
from maskgen.methods.learned import Mode, Result
from maskgen.recipes.recipe import Recipe
from maskgen.train.objective import in_mode
from maskgen.train.step import Session


def measure_quality(
    session: Session, corpus: Corpus, names: Sequence[str], recipe: Recipe, model_dir: Path
) -> Quality | str:
    """What `session` would be written as against the dense model in `model_dir`, or why that cannot be measured."""
    every = -(-len(corpus.heldout) // WINDOWS)
    text = HeldOutText(corpus.heldout[::every, :WINDOW_TOKENS], len(corpus.bos.ids), names)
    pattern = str(recipe.pattern) if session.method.result is Result.SPARSE else ""
    try:
        dense = _dense(session, model_dir)
        found = measure(_in_mode(session, Mode.HARD), text.windows, text.protocol, 1, dense)
        return quality_of(found, text, recipe.method.name, pattern)
    except (ModelError, NumericalError) as error:
        return str(error)


def _in_mode(session: Session, mode: Mode) -> Logits:
    def run(ids_BT: Tensor) -> Tensor:
        with in_mode(session.layers, mode):
            return session.objective.logits(session.model, ids_BT.to(session.device))

    return logits_of(session.model, run)


def _dense(session: Session, model_dir: Path) -> Logits:
    """The dense model: the session's own frozen weights, its teacher, or read again where neither is there."""
    if not session.method.trains_weights and session.spec.scope == "targets":
        return _in_mode(session, Mode.DENSE)
    teacher = session.objective.teacher
    if teacher is None:
        dtype = torch.float32 if session.spec.torch_dtype is torch.float32 else "auto"
        return logits_of(model.load(model_dir, dtype, str(session.device)))
    return logits_of(teacher, lambda ids_BT: session.objective.logits(teacher, ids_BT.to(session.device)))
