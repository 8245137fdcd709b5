"""`prune`, `learn` and `run`: a dense model, a recipe and text -> a checkpoint.

A run that is stopped continues when it is asked for again: what is done is kept in OUT.work until the result is there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgen.api import budgeting, checks
from maskgen.api import task as tasks
from maskgen.api.events import Listener, Stage, silent
from maskgen.api.heldout import NO_TEXT, measure_dense, measure_pruned
from maskgen.api.requests import LearnRequest, PruneRequest
from maskgen.api.task import Task
from maskgen.api.text import read_text, with_own_text
from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.digest import StoredModel, digest_weights
from maskgen.core.errors import OutputExistsError, RecipeError, RequestError
from maskgen.core.failures import explained
from maskgen.core.files import read_json
from maskgen.core.quality import Quality, stored
from maskgen.data.bos import Bos
from maskgen.export import compress
from maskgen.export.allocation import Allocation, dense_layers, stored_allocation
from maskgen.export.compress import CompressReport
from maskgen.hf import model, planning
from maskgen.hf.planning import Plan
from maskgen.hf.pruning_cost import HeldOutText
from maskgen.numerics.memory import peak_rss_bytes
from maskgen.recipes.recipe import RECIPE_FILE, Recipe
from maskgen.sweep import reconstruct, result
from maskgen.sweep.driver import sweep
from maskgen.sweep.report import SweepReport
from maskgen.sweep.workdir import WorkDir, finish, is_left_over, work_dir
from maskgen.train import run as run_module
from maskgen.train.budget import Budget, any_steps
from maskgen.train.job import Job
from maskgen.train.log import LOG_FILE
from maskgen.train.loop import Cadence
from maskgen.train.prior import check_base
from maskgen.train.result import Written


@dataclass(frozen=True)
class PruneResult:
    """A checkpoint in `out`, what the sweep did and cost, and what was written.

    `plan` says what was pruned and what stayed dense. `peak_memory_bytes` is the peak of this process's memory. `bos`
    is what calibration windows begin with (None: the method needs none). `quality` is what was measured on held-out
    text, or why nothing was, and `allocation` how a budget was spent.
    """

    out: Path
    plan: Plan
    sweep: SweepReport
    written: CompressReport
    peak_memory_bytes: int
    bos: Bos | None = None
    quality: Quality | str = NO_TEXT
    allocation: Allocation | None = None


@dataclass(frozen=True)
class LearnResult:
    """A result in `out`, what was written, and the records of the training log (`maskgen.train.log`).

    `plan` says what was trained to be sparse and what stayed dense. `quality` is what was measured on held-out text, or
    why nothing was, and `allocation` how a budget was spent.
    """

    out: Path
    plan: Plan
    written: Written
    records: Sequence[Mapping[str, Any]]
    quality: Quality | str
    allocation: Allocation | None = None

    @property
    def log(self) -> Path:
        """The log beside the weights."""
        return self.out / LOG_FILE


@dataclass(frozen=True)
class AlreadyFinished:
    """The result in `out` is whole and of the same recipe; an earlier process was killed while it tidied up.

    What it had left of its work directory is removed now.
    """

    out: Path


@explained()
def prune(request: PruneRequest, progress: Listener = silent) -> PruneResult | AlreadyFinished:
    """Run a one-shot method over a dense model, block by block, and write a sparse checkpoint.

    Raises `RecipeError` (a learned method, a field about training), `OutputExistsError`, `ModelError`, `DataError`,
    `RequestError` (the device, another kind of request) before anything is loaded; `NumericalError`, `StorageError` (a
    full disk) and `OutOfMemoryError` while it works.
    """
    checks.is_request(request, PruneRequest, "prune")
    recipe = checks.load_recipe(request)
    if not checks.is_one_shot(recipe):
        raise RecipeError(f"{recipe.method.name} is a learned method; use learn, or run, with a LearnRequest")
    checks.no_training_fields(request, recipe)
    with checks.claimed(request.out):
        task = _settled(request, recipe, progress)
        return task if isinstance(task, AlreadyFinished) else _prune(request, task, progress)


@explained()
def learn(request: LearnRequest, progress: Listener = silent) -> LearnResult | AlreadyFinished | None:
    """Train masks, weights or widths with a learned method, and write the result.

    Under torchrun every process calls this; only the first one tells of its progress and returns a result, the others
    None. Raises as `prune` does, and `RecipeError` for a one-shot method.
    """
    began_s = time.monotonic()
    checks.is_request(request, LearnRequest, "learn")
    recipe = checks.load_recipe(request)
    if checks.is_one_shot(recipe):
        raise RecipeError(f"{recipe.method.name} is a one-shot method; use prune, or run")
    with checks.claimed(request.out):
        task = _settled(request, recipe, progress)
        return task if isinstance(task, AlreadyFinished) else _learn(request, task, began_s, progress)


@explained()
def run(request: LearnRequest, progress: Listener = silent) -> PruneResult | LearnResult | AlreadyFinished | None:
    """`prune` or `learn`, as the recipe's method wants it.

    Raises what they do, and `RecipeError` for fields about training that were set for a one-shot method.
    """
    began_s = time.monotonic()
    checks.is_request(request, LearnRequest, "run")
    recipe = checks.load_recipe(request)
    with checks.claimed(request.out):
        task = _settled(request, recipe, progress)
        if isinstance(task, AlreadyFinished):
            return task
        if not checks.is_one_shot(recipe):
            return _learn(request, task, began_s, progress)
        checks.no_training_fields(request, recipe)
        return _prune(request, task, progress)


def _settled(request: PruneRequest, recipe: Recipe, progress: Listener) -> Task | AlreadyFinished:
    """The task, unless its result is there already, and only the work directory is left to remove."""
    work = work_dir(request.out)
    for folder in (request.out, work):
        if request.masks_out is not None and request.masks_out.absolute().is_relative_to(folder.absolute()):
            raise RequestError(f"`masks_out` {request.masks_out}: is in {folder}; choose a place outside of it")
    cleaning_up = request.out.exists() and is_left_over(work) and not request.keep_work
    if not cleaning_up:
        checks.absent(request.out, request.masks_out)
    task = tasks.settled(request, recipe, progress)
    budgeting.check(request, task)
    return _clean_up(request, task.recipe) if cleaning_up else task


def _clean_up(request: PruneRequest, recipe: Recipe) -> AlreadyFinished:
    """A run was killed when its result was there, whole, and its work directory was not gone yet: do what was left."""
    made_with = request.out / RECIPE_FILE
    made = read_json(made_with) if made_with.is_file() else {}
    if isinstance(request, LearnRequest) and request.minutes is not None and isinstance(made.get("train"), dict):
        recipe, made["train"]["steps"] = any_steps(recipe), 1
    if made != recipe.resolved():
        raise OutputExistsError(f"{request.out} exists, of another recipe; remove it or choose another output")
    if request.masks_out is not None and not request.masks_out.exists():
        SparseCheckpoint.open(request.out).mask_set().save(request.masks_out)
    finish(work_dir(request.out), keep=False)
    return AlreadyFinished(request.out)


def _prune(request: PruneRequest, task: Task, progress: Listener) -> PruneResult:
    task = tasks.one_shot(request, task)
    request = with_own_text(request, task, progress)
    recipe = task.recipe
    weights = StoredModel.of(task.model_dir)
    base_digest = digest_weights(task.model_dir)
    check_base(task.prior, task.model_dir, base_digest, task.prior_weights)
    windows_ST, bos, text = read_text(request, task)
    search, text = budgeting.divided(task, text)
    progress(task.plan.planned())
    folder, wanted = work_dir(request.out), budgeting.measuring(request, task, windows_ST, bos, base_digest, search)
    while True:
        if wanted is not None:
            task, folder = budgeting.spent(wanted, task, progress)
        report, work, quality = _sweep(folder, task, windows_ST, text, base_digest, progress)
        gc.collect()
        if wanted is not None:
            task, wanted = budgeting.proven(wanted, task, quality)
        if wanted is None:
            break
    progress(Stage("writing"))
    weights.check()
    extra = {**reconstruct.report(report.fitted), **stored(quality), **stored_allocation(task.allocation)}
    masks, written = result.write(work, recipe, task.model_dir, task.label, base_digest, task.plan, request.out, extra)
    if request.masks_out is not None:
        masks.save(request.masks_out)
    finish(work_dir(request.out), request.keep_work)
    return PruneResult(request.out, task.plan, report, written, peak_rss_bytes(), bos, quality, task.allocation)


def _learn(request: LearnRequest, task: Task, began_s: float, progress: Listener) -> LearnResult | None:
    task = tasks.learned(request, task)
    request = with_own_text(request, task, progress)
    job = Job(
        recipe=task.recipe,
        model_dir=task.model_dir,
        label=task.label,
        planned=task.plan.planned(),
        data=request.data,
        out=request.out,
        bos=request.bos,
        masks_out=request.masks_out,
        prior=task.prior,
        start=task.start,
        allocation=task.allocation,
        device=task.device,
        cadence=Cadence(
            request.micro_batch, request.eval_every or 0, request.checkpoint_every or 0, request.keep_checkpoints
        ),
        checkpoint_activations=request.checkpoint_activations,
        shard=request.shard,
        budget=None if request.minutes is None else Budget(request.minutes, began_s),
    )
    found = run_module.learn(job, progress)
    if found is None:
        return None
    finish(job.work, request.keep_work)
    plan = budgeting.with_allocation(task, found.allocation).plan
    return LearnResult(request.out, plan, found.written, found.records, found.quality, found.allocation)


def load_checked(task: Task) -> tuple[torch.nn.Module, Plan]:
    """The dense model, when nothing about its directory will be refused in the end, and what of it is pruned."""
    targets = [name for block in task.plan.targets for name in block]
    compress.check_source(task.model_dir, task.recipe.pattern, targets, task.plan.listed)
    loaded = model.load(task.model_dir)
    return loaded, planning.plan_of(
        task.model_dir, task.recipe.pattern, task.recipe.ignore, loaded, dense_layers(task.allocation)
    )


def _sweep(
    folder: Path,
    task: Task,
    windows_ST: Tensor | None,
    text: HeldOutText | str,
    base_digest: str,
    progress: Listener,
) -> tuple[SweepReport, WorkDir, Quality | str]:
    """Load, measure, sweep with the work directory `folder`, and measure again.

    The dense model lives in here only: what follows needs the memory.
    Some architectures refer to themselves, which only the collector undoes; the caller runs it.
    """
    recipe, device = task.recipe, task.device
    masks, digest = (None, None) if task.prior is None else (task.prior.mask, task.prior.digest())
    start, weights, sparse = task.prior_weights, None, None if task.start is None else task.start.checkpoint
    if start is not None:
        digest, weights = digest_weights(start.path), lambda name: start.packed(name).unpack()
    if sparse is not None:
        digest = digest_weights(sparse.path)
    progress(Stage("loading"))
    loaded, plan = load_checked(task)
    before = measure_dense(loaded, plan.blocks, text, device, progress)
    report, work = sweep(
        loaded, plan, recipe, windows_ST, folder, base_digest, device, progress, masks, digest, weights, sparse
    )
    quality = measure_pruned(loaded, before, recipe.method.name, str(recipe.pattern), device, progress)
    return report, work, quality
