"""The budget of a request: what it asks for, whether that can be had, and what it is spent on."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from maskgen.api.events import Listener, Stage
from maskgen.api.requests import PruneRequest
from maskgen.api.task import Task, result_form
from maskgen.core.checkpoint import WEIGHT_SUFFIX, read_headers
from maskgen.core.errors import DataError, NumericalError, RecipeError, RequestError
from maskgen.core.quality import Quality
from maskgen.data.bos import Bos
from maskgen.export.allocation import Allocation, Proof, dense_layers
from maskgen.hf import planning
from maskgen.hf.fused import ServedLayer
from maskgen.hf.pruning_cost import HeldOutText
from maskgen.sweep import budget
from maskgen.sweep.budget import Measuring
from maskgen.sweep.kernel_times import Times, times_of
from maskgen.sweep.workdir import work_dir

ATTEMPTS = 4
"""Most results of which one has to keep what was asked of the perplexity."""

MOST_OF_LAST = 0.9
"""What is searched for after a result that did not is at most so much of what was searched for before."""


def check(request: PruneRequest, task: Task) -> None:
    """Raise `RecipeError` for a budget that cannot be met, or not with this request; nothing is read but headers."""
    wanted = task.recipe.budget
    if wanted is None:
        _times(request, task)
        return
    if request.prior is not None and (task.recipe.block_method() is not None or task.recipe.train is not None):
        raise RecipeError(
            f"`prior` {request.prior}: a budget measures the layers that the recipe's own [prior] prunes; leave one of "
            "them out"
        )
    if task.start is not None:
        raise RecipeError(
            f"`{task.start.given_as}` {task.start.checkpoint.path}: which layers of it are sparse is settled, so there "
            "is no budget to spend; start from the dense model"
        )
    if not request.data:
        raise DataError("a budget is measured on text; give it with `data`")
    budget.check(wanted, _layers(task), _times(request, task))


def divided(task: Task, text: HeldOutText | str) -> tuple[HeldOutText | None, HeldOutText | str]:
    """Held-out windows to search on, for a budget of perplexity, and those to measure the result on: every other one.

    `DataError` for a text too short to have both.
    """
    if task.recipe.budget is None or task.recipe.budget.max_ppl_increase is None:
        return None, text
    if isinstance(text, str) or len(text.ids_ST) < 2:
        raise DataError(
            "budget.max_ppl_increase is searched for on held-out windows and proven on others, and the text is too "
            "short for both; give more with `data`"
        )
    return replace(text, ids_ST=text.ids_ST[0::2]), replace(text, ids_ST=text.ids_ST[1::2])


def measuring(
    request: PruneRequest,
    task: Task,
    windows_ST: Tensor | None,
    bos: Bos | None,
    base_digest: str,
    search: HeldOutText | None,
) -> Measuring | None:
    """What the budget of a one-shot run is spent on; None without one."""
    recipe = task.recipe
    if recipe.budget is None:
        return None
    strict = recipe.strict() if recipe.block_method() is None else recipe.prior_recipe()
    assert strict is not None and windows_ST is not None and bos is not None
    prior, digest = (None, None) if task.prior is None else (task.prior.mask, task.prior.digest())
    return Measuring(
        recipe=strict,
        budget=recipe.budget,
        model_dir=task.model_dir,
        base_digest=base_digest,
        windows_ST=windows_ST,
        bos_tokens=len(bos.ids),
        device=task.device,
        work=work_dir(request.out),
        form=result_form(recipe),
        prior=prior,
        prior_digest=digest,
        search=search,
        limit=recipe.budget.max_ppl_increase or 0.0,
        times=_times(request, task),
    )


def spent(wanted: Measuring, task: Task, progress: Listener) -> tuple[Task, Path]:
    """Spend the budget: the task with what stays dense, and the work directory of the sweep that leaves it so.

    What it was measured on is let go of.
    """
    progress(Stage("budget"))
    allocation = budget.allocate(wanted, progress)
    gc.collect()
    return with_allocation(task, allocation), budget.folder_of(wanted, allocation)


def proven(wanted: Measuring, task: Task, quality: Quality | str) -> tuple[Task, Measuring | None]:
    """The task with the proof that its budget was met, or what to try next: a smaller increase is searched for.

    Raises `NumericalError` if nothing could be measured, and `RecipeError` after the last attempt, with what came
    nearest.
    """
    asked, allocation = wanted.budget.max_ppl_increase, task.allocation
    if asked is None or allocation is None:
        return task, None
    if isinstance(quality, str):
        raise NumericalError(f"budget.max_ppl_increase {asked:g} cannot be proven: {quality}")
    if quality.increase <= asked:
        proof = Proof(
            increase=quality.increase,
            dense_perplexity=quality.dense_perplexity,
            perplexity=quality.perplexity,
            windows=quality.windows,
            attempt=wanted.attempt,
        )
        return replace(task, allocation=allocation.model_copy(update={"proof": proof})), None
    if wanted.attempt == ATTEMPTS:
        raise RecipeError(
            f"budget.max_ppl_increase {asked:g}: not proven in {ATTEMPTS} attempts; the nearest that can be met is "
            f"{quality.increase:.4f}, at {allocation.bytes:.4f} of the bytes (budget.bytes)"
        )
    limit = wanted.limit * min(MOST_OF_LAST, asked / quality.increase)
    return task, replace(wanted, limit=limit, attempt=wanted.attempt + 1)


def with_allocation(task: Task, allocation: Allocation | None) -> Task:
    """The task with what a budget keeps dense."""
    recipe, dense = task.recipe, dense_layers(allocation)
    plan = planning.plan_of(task.model_dir, recipe.pattern, recipe.ignore, budgeted=dense)
    return replace(task, plan=plan, allocation=allocation)


def _times(request: PruneRequest, task: Task) -> list[Times]:
    """How long each layer takes, for a budget of time. `RequestError` without a table, and for one that is not used."""
    wanted, table = task.recipe.budget, request.kernel_table
    if wanted is None or wanted.speedup is None:
        if table is not None:
            raise RequestError(f"`kernel_table` {table}: only a budget of time reads it (`speedup`); leave it out")
        return []
    if task.recipe.build_method().correction is not None:
        raise RecipeError(
            "budget.speedup: layers have a correction (rank), of which kernel tables have no times; ask for bytes or "
            "max_ppl_increase, or leave the correction out"
        )
    if table is None:
        raise RequestError(
            "`speedup`: needs the times of this machine's kernels, which `sparse-serve tune CHECKPOINT` measures and "
            "keeps (the newest kernels-* in sparse-serve of your cache directory); give that as `kernel_table`"
        )
    headers = read_headers(task.model_dir)
    name = next(name for block in task.plan.targets for name in block)
    dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[headers[name + WEIGHT_SUFFIX].dtype]
    return times_of(table, _layers(task), task.recipe.pattern, dtype)


def _layers(task: Task) -> list[ServedLayer]:
    """The prunable layers, and their bytes as the result would store them."""
    return budget.layers_of(task.model_dir, task.plan, result_form(task.recipe))
