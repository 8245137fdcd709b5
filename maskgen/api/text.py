"""The text of a request: what the dense model writes itself, the windows to calibrate on, and those held out."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from maskgen.api.events import Listener, Stage
from maskgen.api.heldout import NO_TEXT, SHORT_TEXT
from maskgen.api.requests import LearnRequest, PermuteRequest, PruneRequest
from maskgen.api.task import Task
from maskgen.data import own, tokens
from maskgen.data.bos import Bos
from maskgen.data.heldout import WINDOWS, HeldOut
from maskgen.hf import model
from maskgen.hf.pruning_cost import HeldOutText

Wanted = TypeVar("Wanted", PruneRequest, LearnRequest, PermuteRequest)


def with_own_text(request: Wanted, task: Task, progress: Listener) -> Wanted:
    """The request, with the file of text that the dense model writes in place of every `self` (`maskgen.data.own`).

    Raises `DataError` when it cannot write any.
    """
    data = [
        own.written(source, task.model_dir, task.device, lambda what: progress(Stage(what)))
        if own.is_own(source)
        else source
        for source in request.data
    ]
    return request.model_copy(update={"data": tuple(data)})


def read_text(
    request: PruneRequest | PermuteRequest, task: Task
) -> tuple[Tensor | None, Bos | None, HeldOutText | str]:
    """Windows of calibration text `[S, T]` (windows, tokens), what they begin with, and held-out text or why none.

    The first two are None for a run that needs no text; what it is given is read for the held-out windows alone.
    """
    section, needs_text = task.recipe.calibration, task.recipe.needs_text
    if not request.data:
        return None, None, NO_TEXT
    tokenizer = model.load_tokenizer(task.model_dir)
    bos, windows_ST = Bos.of(tokenizer, request.bos), None
    budget = task.recipe.budget
    most = WINDOWS if budget is None or budget.max_ppl_increase is None else 2 * WINDOWS  # half of them to search on
    heldout = HeldOut(len(request.data), model.stored_max_tokens(task.model_dir), bos, most)
    if needs_text:
        assert section.window_tokens is not None
        generator = torch.Generator().manual_seed(section.seed)
        windows_ST = tokens.calibration_windows(
            request.data, tokenizer, section.samples, section.window_tokens, generator, bos, heldout
        )
    else:
        for source in request.data:
            heldout.take(source, tokens.read_tokens(source, tokenizer))
    ids_ST = heldout.windows()
    for ids in (windows_ST, ids_ST):
        if ids is not None:
            model.check_ids(ids, tokenizer.get_vocab(), task.model_dir)
    text = SHORT_TEXT if ids_ST is None else HeldOutText(ids_ST, len(bos.ids), heldout.names)
    return windows_ST, bos if needs_text else None, text
