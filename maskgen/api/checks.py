"""What is checked of a request before anything is loaded: each check stands here once.

Messages name fields of the request in backticks; the command line shows its flags instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from maskgen.api.events import Listener, Stage
from maskgen.api.requests import TRAINING_FIELDS, LearnRequest, PermuteRequest, PruneRequest
from maskgen.core.checkpoint import (
    SparseCheckpoint,
    check_directory,
    check_packable,
    is_sparse_checkpoint,
    read_dense_config,
    read_headers,
)
from maskgen.core.companions import check_companions
from maskgen.core.digest import digest_weights
from maskgen.core.errors import (
    DataError,
    ModelError,
    OutputExistsError,
    RecipeError,
    RequestError,
    clip,
)
from maskgen.core.files import check_folder, check_writable, read_json
from maskgen.core.lock import exclusive
from maskgen.core.mask import MaskSet
from maskgen.data.tokens import check_window_tokens
from maskgen.export.allocation import Allocation, dense_layers, read_allocation
from maskgen.export.compress import model_label
from maskgen.hf import model, planning, servable
from maskgen.hf.planning import Plan
from maskgen.methods import LocalMethod
from maskgen.methods.blockwise import BlockMethod
from maskgen.methods.learned import LearnedMethod, Result
from maskgen.recipes import recipe as recipe_module
from maskgen.recipes.recipe import Recipe
from maskgen.recipes.sections import ASKS
from maskgen.train.parallel import is_first
from maskgen.train.prior import given_start, load_prior, load_prior_weights
from maskgen.train.start import Start

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Task:
    """A request's recipe, settled for its dense model in `model_dir` (`label` for people), and where to compute.

    `plan` says what will be pruned; its layers are on torch's meta device. `prior` are masks to start from, and
    `prior_weights` the checkpoint that has weights to go with them, for a method that trains blocks. `start` is the
    sparse checkpoint that the request names as its model, to be trained further. `allocation` says what a
    budget keeps dense: the recipe's once it is spent, or that of what the run starts from.
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


def absent(*paths: Path | None) -> None:
    """`OutputExistsError` for a place to write to that is taken, `StorageError` for one where nothing can be made."""
    for path in paths:
        if path is not None:
            if path.exists():
                raise OutputExistsError(f"{path} exists; remove it or choose another output")
            check_writable(path)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """No other process makes `out` meanwhile; of the processes that torchrun starts, the first one sees to it.

    Raises `OutputExistsError` when another one is at work on it, `StorageError` where nothing can be made.
    """
    if out.name in ("", ".."):
        raise OutputExistsError(f"{out} exists; choose another output")
    check_folder(out)
    with exclusive(out) if is_first() else nullcontext():
        yield


@contextmanager
def new_output(out: Path) -> Iterator[None]:
    """`claimed`, for an output that must not be there yet."""
    absent(out)
    with claimed(out):
        yield


def resolve_device(name: str | None) -> str:
    """Where to compute: `name`, or a GPU if there is one. `RequestError` for a device that this machine lacks."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        is_real = torch.empty(0, device=name).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise RequestError(f"`device` {name}: not usable here: {reason}; expected cpu, cuda or cuda:N") from None
    if not is_real:
        raise RequestError(f"`device` {name}: computes nothing; expected cpu, cuda or cuda:N")
    return name


def find_model(source: str, progress: Listener) -> Path:
    """The directory of a model: a directory, a hub id, or a GGUF file, which is converted (`maskgen.hf.model`).

    Raises `ModelError` when there is none, and `FormatError` naming a file that is missing or cut off.
    """
    model_dir = model.resolve(source, lambda what: progress(Stage(what)) if is_first() else None)
    check_directory(model_dir)
    read_json(model_dir / "config.json")
    read_headers(model_dir)
    check_companions(model_dir)
    return model_dir


def label(source: str, model_dir: Path) -> str:
    """What people know a model by: a hub id, or the name of its directory or GGUF file."""
    if Path(source).is_file():
        return Path(source).stem
    return model_label(model_dir) if Path(source).is_dir() else source


def settled(request: PruneRequest | PermuteRequest, recipe: Recipe, progress: Listener) -> Task:
    """Find the device and the dense model, and settle the recipe for it."""
    device, model_dir = resolve_device(request.device), find_model(request.model, progress)
    name, start = label(request.model, model_dir), None
    given = request.prior if isinstance(request, PruneRequest) else None
    if is_sparse_checkpoint(model_dir):
        start = _start(request, model_dir, recipe, progress)
        name, model_dir = start.checkpoint.config.base_model, start.model_dir
    elif isinstance(request, LearnRequest) and request.teacher is not None:
        raise RequestError(
            f"`teacher` {request.teacher}: {request.model} is dense, and is its own teacher; leave it out, or give a "
            "sparse checkpoint as `model`"
        )
    elif given is not None and _takes_weights(recipe):
        start = given_start(given, model_dir, recipe.method.name)
        if is_first():
            start.check_base(digest_weights(model_dir))
    recipe = recipe.for_context(model.stored_max_tokens(model_dir))
    if start is not None if _takes_weights(recipe) else given is not None and recipe.block_method() is not None:
        recipe = recipe.model_copy(update={"prior": None})  # what is given takes its place
    if isinstance(request, PruneRequest) and not request.allow_unserved:
        servable.table().check(servable.architectures(read_dense_config(model_dir)))
    source = given if start is None else start.checkpoint.path
    allocation = None if source is None or recipe.budget is not None else read_allocation(source)
    plan = planning.plan_of(model_dir, recipe.pattern, recipe.ignore, budgeted=dense_layers(allocation))
    check_packable(read_headers(model_dir), (name for block in plan.targets for name in block))
    if start is not None:
        start.check_form(
            recipe.pattern, _learned(recipe).correction, {name for block in plan.targets for name in block}
        )
    return Task(recipe, model_dir, name, device, plan, start=start, allocation=allocation)


def _start(request: PruneRequest | PermuteRequest, sparse_dir: Path, recipe: Recipe, progress: Listener) -> Start:
    """The sparse checkpoint to train further, and the dense model it was made from.

    Raises `ModelError` for a method that does not train weights, or when there is no dense model.
    """
    method = recipe.build_method()
    if not isinstance(request, LearnRequest) or not isinstance(method, LearnedMethod) or not method.trains_weights:
        also = ", with this checkpoint as `prior`" if isinstance(request, PruneRequest) and method.uses_prior else ""
        raise ModelError(f"{request.model}: already sparse; start from the dense model{also}")
    if request.prior is not None:
        raise RequestError(f"`prior` {request.prior}: {request.model} is sparse and has masks of its own; leave it out")
    checkpoint = SparseCheckpoint.open(sparse_dir)
    start = Start(checkpoint, _dense_model(checkpoint, request.teacher, progress))
    if is_first():
        start.check_base(digest_weights(start.model_dir))
    return start


def _dense_model(checkpoint: SparseCheckpoint, given: str | None, progress: Listener) -> Path:
    """The directory of the model that `given` names, or that a checkpoint states as its base.

    What it states is taken for the name of a directory or a GGUF file beside it, or for a hub id, and never for a path.
    """
    name = checkpoint.config.base_model
    if given is None:
        folder = checkpoint.path.absolute().parent
        beside = [folder / name, folder / f"{name}.gguf"] if Path(name).name == name != ".." else []
        given = next((str(path) for path in beside if path.exists()), name if _HUB_ID.fullmatch(name) else None)
        advice = f"{checkpoint.path}: made from {clip(name)}, %s; give that dense model as `teacher`"
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


def one_shot(request: PruneRequest, task: Task) -> Task:
    """The task with its prior, when everything that a one-shot run needs is there."""
    recipe = task.recipe
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


def is_request(request: object, kind: type[PruneRequest], function: str) -> None:
    """`RequestError` unless a function was given the kind of request it takes."""
    if not isinstance(request, kind):
        raise RequestError(f"{function} was given a {type(request).__name__}, expected a {kind.__name__}")


def no_training_fields(request: PruneRequest, recipe: Recipe) -> None:
    """`RecipeError` for a field that was set and that a one-shot method has no use for."""
    for name in TRAINING_FIELDS:
        if name in request.model_fields_set:
            raise RecipeError(f"`{name}`: {recipe.method.name} is a one-shot method and does not train; leave it out")


def load_recipe(request: PruneRequest | PermuteRequest) -> Recipe:
    """The recipe that a request names, with its overrides and the budget that it asks for."""
    given = {name: getattr(request, name, None) for name in ASKS}
    asked = {name: value for name, value in given.items() if value is not None}
    return recipe_module.load(request.recipe, request.overrides, asked)


def _learned(recipe: Recipe) -> LearnedMethod:
    method = recipe.build_method()
    assert isinstance(method, LearnedMethod)
    return method


def _takes_weights(recipe: Recipe) -> bool:
    """Whether training starts from the weights of the prior, too."""
    method = recipe.build_method()
    return isinstance(method, LearnedMethod) and method.uses_prior_weights


def is_one_shot(recipe: Recipe) -> bool:
    """Whether its method goes from block to block, and is not learned end to end."""
    return isinstance(recipe.build_method(), LocalMethod | BlockMethod)
