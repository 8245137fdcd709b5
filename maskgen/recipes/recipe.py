"""Recipes: everything about a *result*, in one frozen, strict object read from TOML.

What is about the machine (device, threads, directories) is a flag and never stored; what decides the numbers is here,
and its digest is written into every artefact. An unknown key is an error that lists the known ones. Method options
are resolved when the recipe is read, so a recipe that spells out a default and one that does not have one digest.

    pattern = "2:4"                        # n kept of every m columns
    ignore = ["model.layers.0.*"]          # fnmatch patterns on module names to keep dense (default: none)

    [method]
    name = "sparsegpt"                     # a file of maskgen/methods; the other keys are its options
    damp = 0.01

    [calibration]
    samples = 64                           # windows of calibration text
    window_tokens = 512                    # tokens of each (default: 512, or the model's context if that is shorter)
    seed = 0                               # where in the text they are cut
    batch = 8                              # windows per forward pass

A learned method has two sections more. `[prior]` is written like `[method]` and names the one-shot method that makes
the mask to start from, on the `[calibration]` text; it is dropped when the method's options have no use for it.

    [prior]
    name = "sparsegpt"
    update = false

    [train]
    steps = 300                            # see `Training`; defaults for what is left out
    lr = 1e-3

With `weights = "prior"` a method that trains weights (`adaptive_sparse`) starts from its weights, too.

A method that trains block after block (`reconstruct`) has a `[prior]` too, which prunes the block first. Every recipe
may have a [budget]: layers whose sparsity costs most then stay dense, as far as it goes (`sections`).

    [budget]
    bytes = 0.75                           # of what prunable weights take dense; or speedup, or max_ppl_increase

A recipe that prunes layer by layer may have [values] kind = "int8", to round what is kept, and one of `admm` or
`sparsegpt` also kind = "int4", to choose codes in the same pass (`sections`).

The decoder's embeddings and `lm_head` are always dense: only linear layers inside decoder blocks are candidates.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from maskgen.core.digest import digest_json
from maskgen.core.errors import RecipeError
from maskgen.core.pattern import NMPattern
from maskgen.methods import LocalMethod, Method, create
from maskgen.methods.blockwise import BlockMethod
from maskgen.methods.correction import CorrectionMethod
from maskgen.methods.learned import LearnedMethod, Result
from maskgen.recipes.overrides import apply
from maskgen.recipes.sections import Budget, Strict, Training, Values, asking, check_prior, settled_options

WINDOW_TOKENS = {"calibration": 512, "train": 2048}
"""Length of windows by section, for models that read as much. docs/results.md has what was tried."""

RECIPE_FILE = "maskgen_recipe.json"
"""The resolved recipe, written beside the weights."""

_Pattern = Annotated[
    NMPattern,
    BeforeValidator(lambda value: value if isinstance(value, NMPattern) else NMPattern.parse(value)),
    PlainSerializer(str),
]


class Calibration(Strict):
    """Calibration text: `samples` windows of `window_tokens` tokens; `batch` windows go through a block together.

    `window_tokens` is None until `Recipe.for_context` has seen the model.
    """

    samples: int = Field(default=64, ge=1)
    window_tokens: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    batch: int = Field(default=8, ge=1)


class MethodSpec(Strict):
    """A method by name with all of its options, defaults included."""

    name: str
    options: dict[str, bool | int | float | str]

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        """`{name, **options}` as in TOML -> `{name, options}` with defaults filled in and checked."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise RecipeError('method: expected a table with a name, for example [method] name = "wanda"')
        options = {key: option for key, option in value.items() if key != "name"}
        return {"name": value["name"], "options": dataclasses.asdict(create(value["name"], options))}

    def build(self) -> Method:
        """The method, ready to use."""
        return create(self.name, self.options)


class Recipe(Strict):
    """A resolved recipe. Make one with `load` or `parse`. `train` is there exactly when the method is a learned one."""

    pattern: _Pattern = NMPattern(2, 4)
    method: MethodSpec
    prior: MethodSpec | None = None
    calibration: Calibration = Calibration()
    train: Training | None = None
    budget: Budget | None = None
    values: Values | None = None
    ignore: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        """Settle which of the learned methods' sections there are: a recipe has one resolved form."""
        if not isinstance(value, dict) or not isinstance(value.get("method"), dict):
            return value
        try:
            method = MethodSpec.model_validate(value["method"]).build()
        except ValidationError:  # reported, with its place, when the field itself is read
            return value
        if not isinstance(method, LearnedMethod):
            return value
        prior = value.get("prior") if method.uses_prior else None
        return {**value, "prior": prior, "train": value.get("train", {})}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        method = self.build_method()
        method.check_pattern(self.pattern)
        if not isinstance(method, LearnedMethod):
            given = {"prior": None if isinstance(method, BlockMethod) else self.prior, "train": self.train}
            for section in (name for name, value in given.items() if value is not None):
                raise RecipeError(f"[{section}]: {self.method.name} is a one-shot method and has no use for it")
        if self.prior is not None:
            prior = self.prior.build()
            check_prior(self.prior.name, prior, self.method.name, method)
            prior.check_pattern(self.pattern)
        if self.values is not None:
            self.values.check(self.method.name, method, self.budget)
        if self.budget is not None and isinstance(method, LearnedMethod):
            self.budget.check_learned(self.method.name, method.result is Result.SPARSE and self.prior is not None)
        return self

    def for_context(self, limit: int | None) -> Recipe:
        """This recipe with `window_tokens` settled, where it gives no number, for a model that reads at most `limit`
        tokens (None: any number)."""
        changes: dict[str, Calibration | Training] = {}
        for name, section in (("calibration", self.calibration), ("train", self.train)):
            if section is not None and section.window_tokens is None:
                tokens = WINDOW_TOKENS[name] if limit is None else min(WINDOW_TOKENS[name], limit)
                changes[name] = section.model_copy(update={"window_tokens": tokens})
        return self.model_copy(update=changes)

    def on_device(self, device: str) -> Recipe:
        """This recipe with the arithmetic of training settled for `device`, such as "cpu" or "cuda:0"."""
        method = self.method.model_copy(update={"options": settled_options(self.method.options, device)})
        train = None if self.train is None else self.train.settled_on(device)
        return self.model_copy(update={"method": method, "train": train})

    def build_method(self) -> Method:
        """The method, ready to use: a `LocalMethod`, a `BlockMethod`, a `CorrectionMethod` or a `LearnedMethod`."""
        return self.method.build()

    def block_method(self) -> BlockMethod | None:
        """The method that trains each block when it is pruned, if this is a recipe of one."""
        method = self.build_method()
        return method if isinstance(method, BlockMethod) else None

    @property
    def needs_text(self) -> bool:
        """Whether a one-shot run with this recipe needs text: its method does, or its budget."""
        return self.budget is not None or self.needs_data

    @property
    def needs_data(self) -> bool:
        """Whether a sweep with this recipe runs the model on text."""
        method = self.build_method()
        return isinstance(method, BlockMethod | CorrectionMethod) or self.local_method().needs_data

    def local_method(self) -> LocalMethod:
        """The method that prunes one layer at a time: the recipe's, or that of its [prior] if each block is trained
        afterwards. `RecipeError` for a recipe without one.
        """
        method = self.build_method()
        if isinstance(method, BlockMethod):
            if self.prior is None:
                raise RecipeError(
                    f"{self.method.name} starts from a mask: give `prior`, or a [prior] section in the recipe"
                )
            method = self.prior.build()
        if not isinstance(method, LocalMethod):
            raise RecipeError(f"method.name: {self.method.name} does not prune layer by layer; expected one that does")
        return method

    def prior_recipe(self) -> Recipe | None:
        """The one-shot recipe of the mask to start from."""
        if self.prior is None:
            return None
        return self.model_copy(update={"method": self.prior, "prior": None, "train": None, "budget": None})

    def strict(self) -> Recipe:
        """This recipe without its [budget]: every layer is pruned."""
        return self.model_copy(update={"budget": None})

    def symmetric(self) -> Recipe:
        """This recipe with every layer solved for what its own dense weights put out.

        Layers of an asymmetric method make up for those before them, and are of no use beside other ones.
        """
        options = self.method.options
        if "asymmetric" not in options:
            return self
        method = self.method.model_copy(update={"options": {**options, "asymmetric": False}})
        return self.model_copy(update={"method": method})

    def resolved(self) -> dict[str, Any]:
        """JSON-serialisable form with every default spelled out; what `digest` covers."""
        form = self.model_dump(mode="json")
        return {key: value for key, value in form.items() if value is not None}

    def digest(self) -> str:
        """`sha256:<hex>` of the resolved recipe."""
        return digest_json(self.resolved())


def names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def load(source: str, overrides: Sequence[str] = (), budget: Mapping[str, float] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a file by path (`*.toml`), with `key.path=value` overrides applied.

    `budget` takes the place of what the recipe's [budget] asks for, if it is not empty. Raises `RecipeError` for
    anything that is not exactly a recipe.
    """
    return parse(_read(source), f"recipe {source}", overrides, budget)


def parse(
    text: str, where: str = "recipe", overrides: Sequence[str] = (), budget: Mapping[str, float] | None = None
) -> Recipe:
    """Read TOML text, with overrides as `maskgen.recipes.overrides` reads them."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML: {error}") from None
    apply(raw, overrides)
    if budget:
        raw["budget"] = asking(raw.get("budget"), budget)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None


def _folder() -> Any:
    return resources.files("maskgen.recipes")


def _read(source: str) -> str:
    path = Path(source)
    if path.suffix == ".toml":
        try:
            return path.read_text("utf-8")
        except OSError as error:
            raise RecipeError(f"recipe {source}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {source}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    if source not in names():
        raise RecipeError(f"no recipe {source!r}; shipped recipes are {names()}, or give the path of a .toml file")
    text: str = (_folder() / f"{source}.toml").read_text("utf-8")
    return text


def _explain(error: ValidationError) -> str:
    """First problem of a pydantic report as one line; for an unknown key, with the keys that exist."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        models: dict[str, Any] = {"calibration": Calibration, "train": Training, "budget": Budget, "values": Values}
        model = models.get(str(problem["loc"][0]), Recipe)
        return f"unknown key {where}; known keys are {sorted(model.model_fields)}"
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
        return text.replace("method", "prior") if where == "prior" else text
    return f"{where}: {problem['msg'].lower()}, got {str(problem['input'])[:80]!r}"
