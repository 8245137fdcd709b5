"""What a request comes to before anything is loaded: its recipe settled for a model, and what that starts from.

Messages name fields of the request in backticks, as those of `checks`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from maskgen.api.checks import find_model, label, resolve_device
from maskgen.api.events import Listener
from maskgen.api.requests import LearnRequest, PermuteRequest, PruneRequest
from maskgen.core.checkpoint import (
    SparseCheckpoint,
    check_packable,
    is_sparse_checkpoint,
    read_dense_config,
    read_headers,
)
from maskgen.core.correction import CorrectionConfig
from maskgen.core.digest import digest_weights
from maskgen.core.errors import DataError, FormatError, ModelError, RecipeError, RequestError, clip
from maskgen.core.layout import LayerForm
from maskgen.core.mask import MaskSet
from maskgen.data.tokens import check_window_tokens
from maskgen.export.allocation import Allocation, dense_layers, read_allocation
from maskgen.hf import model, planning, servable
from maskgen.hf.planning import Plan
from maskgen.methods.correction import CorrectionMethod
from maskgen.methods.learned import LearnedMethod, Result
from maskgen.recipes.recipe import Recipe
from maskgen.recipes.sections import form_of
from maskgen.sweep.budget import layers_of
from maskgen.train.parallel import is_first
from maskgen.train.prior import given_start, load_prior, load_prior_weights
from maskgen.train.start import Start

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Task:
    """A request's recipe, settled for its dense model in `model_dir` (`label` for people), and where to compute.

    `plan` says what will be pruned; its layers are on torch's meta device. `prior` are masks to start from, and
    `prior_weights` the checkpoint that has weights to go with them, for a method that trains blocks. `start` is the
    sparse checkpoint that the request names as its model or prior, to be trained further or to get a correction.
    `allocation` says what a budget keeps dense: the recipe's once it is spent, or that of what the run starts from.
    """

    recipe: Recipe
    model_dir: Path
    label: str
    device: str
    plan: Plan
    prior: MaskSet | None = None
    start: Start | None = None
    prior_weights: SparseCheckpoint | None = None
    allocation: Allocation | None = None


def settled(request: PruneRequest | PermuteRequest, recipe: Recipe, progress: Listener) -> Task:
    """Find the device and the dense model, and settle the recipe for it."""
    device, start = resolve_device(request.device), None
    name, model_dir = _model(request, progress)
    given = request.prior if isinstance(request, PruneRequest) else None
    if is_sparse_checkpoint(model_dir):
        start = _start(request, model_dir, recipe, progress)
        name, model_dir = start.checkpoint.config.base_model, start.model_dir
    elif request.model is not None and isinstance(request, LearnRequest) and request.teacher is not None:
        raise RequestError(
            f"`teacher` {request.teacher}: {request.model} is dense, and is its own teacher; leave it out, or give a "
            "sparse checkpoint as `model`"
        )
    elif given is not None and _takes_weights(recipe):
        start = given_start(given, model_dir, recipe.build_method(), recipe.method.name)
        if is_first():
            start.check_base(digest_weights(model_dir))
    recipe = recipe.for_context(model.stored_max_tokens(model_dir)).on_device(device)
    if start is not None if _takes_weights(recipe) else given is not None and recipe.block_method() is not None:
        recipe = recipe.model_copy(update={"prior": None})  # what is given takes its place
    if isinstance(request, PruneRequest) and not request.allow_unserved:
        servable.table().check(servable.architectures(read_dense_config(model_dir)))
    source = given if start is None else start.checkpoint.path
    allocation = None if source is None or recipe.budget is not None else read_allocation(source)
    plan = planning.plan_of(model_dir, recipe.pattern, recipe.ignore, budgeted=dense_layers(allocation))
    if start is not None and isinstance(method := recipe.build_method(), CorrectionMethod):
        recipe, plan = _fitting(start, recipe, method, plan, allocation)
    elif start is not None:
        start.check_form(recipe.pattern, _learned(recipe).correction, _targets(plan))
    if (correction := recipe.build_method().correction) is not None:
        _check_fits(correction, recipe.method.name, plan)
    if allocation is not None:
        layers = layers_of(model_dir, plan, result_form(recipe, start))
        allocation = allocation.stored_as({layer.layers[0]: layer.sparse_bytes for layer in layers})
    check_packable(read_headers(model_dir), (name for block in plan.targets for name in block))
    return Task(recipe, model_dir, name, device, plan, start=start, allocation=allocation)


def _model(request: PruneRequest | PermuteRequest, progress: Listener) -> tuple[str, Path]:
    """What people call the model of a request, and its directory: that of the prior, if it names none itself."""
    if request.model is not None:
        model_dir = find_model(request.model, progress)
        return label(request.model, model_dir), model_dir
    if request.prior is None:
        raise RequestError("`model` is missing; give the dense model, or a sparse checkpoint made from it as `prior`")
    if not is_sparse_checkpoint(request.prior):
        raise RequestError(
            f"`model` is missing, and `prior` {request.prior} is no sparse checkpoint, which would say what it was "
            "made from; give the dense model"
        )
    checkpoint = SparseCheckpoint.open(request.prior, verify_bits=False)
    teacher = request.teacher if isinstance(request, LearnRequest) else None
    return checkpoint.config.base_model, _dense_model(checkpoint, teacher, "model", progress)


def _start(request: PruneRequest | PermuteRequest, sparse_dir: Path, recipe: Recipe, progress: Listener) -> Start:
    """The sparse checkpoint that is given as the model, and the dense model it was made from.

    Raises `ModelError` for a method that does not go on from weights, or when there is no dense model.
    """
    method, teacher = recipe.build_method(), request.teacher if isinstance(request, LearnRequest) else None
    trains = isinstance(request, LearnRequest) and isinstance(method, LearnedMethod) and method.trains_weights
    if not isinstance(request, PruneRequest) or not (trains or isinstance(method, CorrectionMethod)):
        also = ", with this checkpoint as `prior`" if isinstance(request, PruneRequest) and method.uses_prior else ""
        raise ModelError(f"{request.model}: already sparse; start from the dense model{also}")
    if request.prior is not None:
        raise RequestError(f"`prior` {request.prior}: {request.model} is sparse and has masks of its own; leave it out")
    checkpoint = SparseCheckpoint.open(sparse_dir)
    field = "teacher" if isinstance(request, LearnRequest) else "model"
    start = Start(checkpoint, _dense_model(checkpoint, teacher, field, progress))
    if is_first():
        start.check_base(digest_weights(start.model_dir))
    return start


def _dense_model(checkpoint: SparseCheckpoint, given: str | None, field: str, progress: Listener) -> Path:
    """The directory of the model that `given` names, or that a checkpoint states as its base.

    What it states is taken for the name of a directory or a GGUF file beside it, or for a hub id, and never for a path.
    Where there is none, `field` is where the request may name it.
    """
    name = checkpoint.config.base_model
    if given is None:
        folder = checkpoint.path.absolute().parent
        beside = [folder / name, folder / f"{name}.gguf"] if Path(name).name == name != ".." else []
        given = next((str(path) for path in beside if path.exists()), name if _HUB_ID.fullmatch(name) else None)
        advice = f"{checkpoint.path}: made from {clip(name)}, %s; give that dense model as `{field}`"
        if given is None:
            raise ModelError(advice % "which is not beside it")
        try:
            return find_model(given, progress)
        except ModelError as error:
            raise ModelError(advice % f"which cannot be used: {error}") from None
    model_dir = find_model(given, progress)
    if is_sparse_checkpoint(model_dir):
        raise ModelError(f"`teacher` {given}: a sparse checkpoint; give the dense model, {clip(name)}")
    return model_dir


def _fitting(
    start: Start, recipe: Recipe, method: CorrectionMethod, plan: Plan, allocation: Allocation | None
) -> tuple[Recipe, Plan]:
    """The recipe and the plan of a correction to all sparse layers of `start`; a recipe that ignores none follows it.

    Raises `RecipeError` unless the checkpoint can have this correction.
    """
    config, where = start.checkpoint.config, f"`{start.given_as}` {start.checkpoint.path}"
    if config.correction is not None:
        raise RecipeError(
            f"{where}: its layers have a correction already, and {recipe.method.name} adds no second one; start from "
            "a checkpoint without"
        )
    dense = sorted(_targets(plan) - set(config.targets))
    if dense and not recipe.ignore and config.pattern == recipe.pattern:
        recipe = recipe.model_copy(update={"ignore": tuple(dense)})
        plan = planning.plan_of(start.model_dir, recipe.pattern, recipe.ignore, budgeted=dense_layers(allocation))
    start.check_form(recipe.pattern, None, _targets(plan))
    return recipe, plan


def _check_fits(correction: CorrectionConfig, method: str, plan: Plan) -> None:
    """Raise `RecipeError` unless every layer can have the correction that `method` makes."""
    layers = [item for block in plan.targets for item in block.items()]
    name, smallest = min(layers, key=lambda item: min(item[1].weight.shape))
    try:
        correction.shapes(smallest.out_features, smallest.in_features, name)
    except FormatError as error:
        raise RecipeError(f"method {method}: {error}") from None


def result_form(recipe: Recipe, start: Start | None = None) -> LayerForm:
    """What the result stores of each sparse layer. A method that corrects leaves values as the checkpoint has them."""
    method = recipe.build_method()
    if isinstance(method, CorrectionMethod) and start is not None:
        config = start.checkpoint.config
        return LayerForm(recipe.pattern, config.values, method.correction, config.group)
    return form_of(recipe.pattern, recipe.values, method.correction)


def one_shot(request: PruneRequest, task: Task) -> Task:
    """The task with its prior, when everything that a one-shot run needs is there."""
    recipe = task.recipe
    if isinstance(recipe.build_method(), CorrectionMethod):
        return _to_correct(request, task)
    if recipe.block_method() is not None and request.prior is not None:
        prior = load_prior(request.prior, True, recipe)
        calibration(request, task)
        return replace(task, prior=prior, prior_weights=load_prior_weights(request.prior))
    method = recipe.local_method()
    prior = load_prior(request.prior, method.uses_prior, recipe)
    if method.uses_prior and prior is None:
        raise RecipeError(f"method {recipe.method.name} with these options needs masks to start from; give `prior`")
    calibration(request, task)
    return replace(task, prior=prior)


def _to_correct(request: PruneRequest, task: Task) -> Task:
    name = task.recipe.method.name
    if task.start is None:
        raise RecipeError(f"{name} starts from a sparse checkpoint: give `prior`")
    if changed := task.start.changed:
        raise RecipeError(
            f"`{task.start.given_as}` {task.start.checkpoint.path}: {len(changed)} tensors of layers that stay dense "
            f"were trained too, such as {next(iter(changed))}, so its layers read other inputs than the dense ones, "
            f"whose weights {name} would restore; start from a checkpoint trained with train.scope=targets"
        )
    calibration(request, task)
    return task


def learned(request: LearnRequest, task: Task) -> Task:
    """The task with its prior, when everything that a learned run needs is there."""
    recipe, name = task.recipe, task.recipe.method.name
    method = _learned(recipe)
    assert recipe.train is not None
    if request.minutes is not None and any(
        item.partition("=")[0].strip() == "train.steps" for item in request.overrides
    ):
        raise RecipeError(f"`minutes` {request.minutes:g}: steps follow from the time; leave train.steps or this out")
    if request.masks_out is not None and method.result is not Result.SPARSE:
        raise RecipeError(f"`masks_out` {request.masks_out}: {name} writes a dense model, without masks; leave it out")
    prior = load_prior(request.prior, method.uses_prior, recipe) if task.start is None else None
    if method.uses_prior and prior is None and recipe.prior is None and task.start is None:
        what = "the weights and masks of a prior" if method.uses_prior_weights else "a mask"
        raise RecipeError(f"{name} starts from {what}: give `prior`, or a [prior] section in the recipe")
    if not request.data:
        raise DataError(f"method {name} learns from text; give it with `data`")
    limit = model.stored_max_tokens(task.model_dir)
    check_window_tokens(recipe.train.window_tokens, limit, "train")
    own = recipe.prior_recipe()
    if method.uses_prior and prior is None and task.start is None and own is not None and own.local_method().needs_data:
        check_window_tokens(recipe.calibration.window_tokens, limit)
    return replace(task, prior=prior)


def calibration(request: PruneRequest | PermuteRequest, task: Task) -> None:
    """`DataError` when a one-shot method lacks text, or wants more of it at once than the model reads."""
    if not task.recipe.needs_text:
        return
    if not request.data:
        raise DataError(f"method {task.recipe.method.name} needs calibration text; give it with `data`")
    section = task.recipe.calibration
    check_window_tokens(section.window_tokens, model.stored_max_tokens(task.model_dir))


def _learned(recipe: Recipe) -> LearnedMethod:
    method = recipe.build_method()
    assert isinstance(method, LearnedMethod)
    return method


def _takes_weights(recipe: Recipe) -> bool:
    """Whether a learned or correcting method starts from the weights of the prior, too."""
    method = recipe.build_method()
    return isinstance(method, CorrectionMethod) or (isinstance(method, LearnedMethod) and method.uses_prior_weights)


def _targets(plan: Plan) -> set[str]:
    return {name for block in plan.targets for name in block}
