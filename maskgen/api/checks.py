"""What is checked of a request before anything is loaded: each check stands here once.

Messages name fields of the request in backticks; the command line shows its flags instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from maskgen.api.events import Listener, Stage
from maskgen.api.requests import TRAINING_FIELDS, PermuteRequest, PruneRequest
from maskgen.core.checkpoint import (
    check_directory,
    read_headers,
)
from maskgen.core.companions import check_companions
from maskgen.core.errors import (
    OutputExistsError,
    RecipeError,
    RequestError,
)
from maskgen.core.files import check_folder, check_writable, read_json
from maskgen.core.lock import exclusive
from maskgen.export.compress import model_label
from maskgen.hf import model
from maskgen.methods import LocalMethod
from maskgen.methods.blockwise import BlockMethod
from maskgen.methods.correction import CorrectionMethod
from maskgen.recipes import recipe as recipe_module
from maskgen.recipes.recipe import Recipe
from maskgen.recipes.sections import ASKS
from maskgen.train.parallel import is_first

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def is_request(request: object, kind: type[PruneRequest], function: str) -> None:
    """`RequestError` unless a function was given the kind of request it takes."""
    if not isinstance(request, kind):
        raise RequestError(f"{function} was given a {type(request).__name__}, expected a {kind.__name__}")


def no_training_fields(request: PruneRequest, recipe: Recipe) -> None:
    """`RecipeError` for a field that was set and that a one-shot method has no use for."""
    for name in TRAINING_FIELDS:
        finds_dense = name == "teacher" and isinstance(recipe.build_method(), CorrectionMethod)
        if name in request.model_fields_set and not finds_dense:
            raise RecipeError(f"`{name}`: {recipe.method.name} is a one-shot method and does not train; leave it out")


def load_recipe(request: PruneRequest | PermuteRequest) -> Recipe:
    """The recipe that a request names, with its overrides and the budget that it asks for."""
    given = {name: getattr(request, name, None) for name in ASKS}
    asked = {name: value for name, value in given.items() if value is not None}
    return recipe_module.load(request.recipe, request.overrides, asked)


def is_one_shot(recipe: Recipe) -> bool:
    """Whether its method goes from block to block, and is not learned end to end."""
    return isinstance(recipe.build_method(), LocalMethod | BlockMethod | CorrectionMethod)
