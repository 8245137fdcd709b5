"""The budget of a request: what it asks for, whether that can be had, and what it is spent on."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from maskgen.api.checks import Task
from maskgen.api.events import Listener, Stage
from maskgen.api.requests import PruneRequest
from maskgen.core.errors import DataError, RecipeError
from maskgen.data.bos import Bos
from maskgen.export.allocation import Allocation, dense_layers
from maskgen.hf import planning
from maskgen.sweep import budget
from maskgen.sweep.budget import Measuring
from maskgen.sweep.workdir import work_dir


def check(request: PruneRequest, task: Task) -> None:
    """Raise `RecipeError` for a budget that cannot be met, or not with this request; nothing is read but headers."""
    wanted = task.recipe.budget
    if wanted is None:
        return
    if request.prior is not None and (task.recipe.block_method() is not None or task.recipe.train is not None):
        raise RecipeError(
            f"`prior` {request.prior}: a budget measures the layers that the recipe's own [prior] prunes; leave one of "
            "them out"
        )
    if task.start is not None:
        raise RecipeError(
            f"`model` {request.model}: which layers of it are sparse is settled, so there is no budget to spend; start "
            "from the dense model"
        )
    if not request.data:
        raise DataError("a budget is measured on text; give it with `data`")
    budget.check(wanted, budget.layers_of(task.model_dir, task.plan, task.recipe))


def measuring(
    request: PruneRequest, task: Task, windows_ST: Tensor | None, bos: Bos | None, base_digest: str
) -> Measuring | None:
    """What the budget of a one-shot run is spent on; None without one."""
    recipe = task.recipe
    if recipe.budget is None:
        return None
    strict = recipe.strict() if recipe.block_method() is None else recipe.prior_recipe()
    assert strict is not None and windows_ST is not None and bos is not None
    prior, digest = (None, None) if task.prior is None else (task.prior.mask, task.prior.digest())
    work, bos_tokens = work_dir(request.out), len(bos.ids)
    return Measuring(
        strict, recipe.budget, task.model_dir, base_digest, windows_ST, bos_tokens, task.device, work, prior, digest
    )


def spent(wanted: Measuring, task: Task, progress: Listener) -> tuple[Task, Path]:
    """Spend the budget: the task with what stays dense, and the work directory of the sweep that leaves it so.

    What it was measured on is let go of.
    """
    progress(Stage("budget"))
    allocation = budget.allocate(wanted, progress)
    gc.collect()
    return with_allocation(task, allocation), budget.folder_of(wanted, allocation)


def with_allocation(task: Task, allocation: Allocation | None) -> Task:
    """The task with what a budget keeps dense."""
    recipe, dense = task.recipe, dense_layers(allocation)
    plan = planning.plan_of(task.model_dir, recipe.pattern, recipe.ignore, budgeted=dense)
    return replace(task, plan=plan, allocation=allocation)
