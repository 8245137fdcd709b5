"""The sections [train], [values] and [budget] of a recipe: what decides a result beside the method's own options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from maskgen.core.correction import CorrectionConfig, LowRankCorrection
from maskgen.core.errors import RecipeError
from maskgen.core.layout import LayerForm
from maskgen.core.pattern import NMPattern
from maskgen.core.values import INT4
from maskgen.methods import LocalMethod, Method
from maskgen.methods.learned import LearnedMethod
from maskgen.numerics.products import ProductsDtype, dtype_of, settled_dtype


class Strict(BaseModel):
    """Base of every section: frozen, unknown keys refused, nothing converted."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True)


class Training(Strict):
    """How a learned method is trained. One step sees `batch` windows of `window_tokens` tokens, whatever the machine.

    `noise_samples` is the number of independent noise draws the windows of a step are divided among; from the number of
    processes on, every process has noise of its own. `dtype` is that of matrix products, "auto" bfloat16 where the
    device multiplies it faster than float32, else float32, which computes with frozen weights in float32 too. `warmup`
    is a fraction of the steps, `final_lr` one of `lr`, `clip` the largest gradient norm (0: no limit). `scope` "blocks"
    also trains what is not pruned in decoder blocks (norms, layers that a budget keeps dense), "all" what is outside of
    them, too (embeddings, the head). `heldout_windows` are taken off the end of the text and never trained on. `blocks`
    [start, stop] learns in these decoder blocks only, while all others keep the prior's masks: a model whose states do
    not fit is learned a few blocks at a time, each run starting from the masks of the one before.
    """

    steps: int = Field(default=300, ge=1)
    batch: int = Field(default=16, ge=1)
    window_tokens: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0)
    noise_samples: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    decay: Literal["cosine", "linear"] = "cosine"
    final_lr: float = Field(default=0.1, ge=0, le=1)
    clip: float = Field(default=1.0, ge=0)
    dtype: ProductsDtype = "auto"
    scope: Literal["targets", "blocks", "all"] = "targets"
    distill_weight: float = Field(default=0.0, ge=0, le=1)
    distill_temperature: float = Field(default=1.0, gt=0)
    heldout_windows: int = Field(default=64, ge=1)
    blocks: Annotated[tuple[int, int], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.noise_samples > self.batch:
            raise RecipeError(
                f"train.noise_samples {self.noise_samples}: more than the {self.batch} windows of a step (train.batch)"
            )
        if self.blocks is not None and not 0 <= self.blocks[0] < self.blocks[1]:
            raise RecipeError(f"train.blocks {list(self.blocks)}: expected [start, stop] with 0 <= start < stop")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of matrix products, once it is settled (`settled_on`)."""
        return dtype_of(self.dtype)

    def settled_on(self, device: str) -> Training:
        """With the dtype that "auto" is on `device`."""
        return self.model_copy(update={"dtype": settled_dtype(self.dtype, torch.device(device))})


def settled_options(options: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The options of a method, its `dtype`, if it has one, as "auto" is on `device`."""
    dtype = {"dtype": settled_dtype(options["dtype"], torch.device(device))} if "dtype" in options else {}
    return {**options, **dtype}


ASKS = ("bytes", "speedup", "max_ppl_increase")
"""The ways to ask for a budget."""


class Values(Strict):
    """How kept weights are stored, where it is not as the model has them.

    `int8` and `fp8_e4m3` round each to the nearest code of its row. The codes of `int4` are chosen for the outputs of
    the layer, so that weights make up for the rounding of others; `group` of them in a row share a scale (128 if it is
    not given; "row": all). Layers make up for the rounding of those before them, if the method is asymmetric.
    """

    kind: Literal["int8", "fp8_e4m3", "int4"]
    group: Literal[64, 128, "row"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_group(cls, value: Any) -> Any:
        """int4 codes have a group, so that a recipe has one resolved form."""
        if isinstance(value, dict) and value.get("kind") == INT4 and value.get("group") is None:
            return {**value, "group": 128}
        return value

    @model_validator(mode="after")
    def _check(self) -> Values:
        if self.group is not None and self.kind != INT4:
            raise RecipeError(f"values.group {self.group}: {self.kind} values have a scale for each row; leave it out")
        return self

    def check(self, name: str, method: Method, budget: Budget | None) -> None:
        """`RecipeError` unless the recipe's `method`, called `name`, can round, and the `budget` can count it."""
        if not isinstance(method, LocalMethod):
            raise RecipeError(
                f"[values]: {name} does not round what it makes, as methods do that prune layer by layer; leave the "
                "section out (`maskgen quantise` rounds a result that is sparse)"
            )
        if self.kind == INT4 and not method.keeps_gram:
            raise RecipeError(
                f"[values]: {name} does not see how inputs go together, as admm and sparsegpt do; leave the section "
                "out, and round the result with `maskgen quantise`"
            )
        if budget is not None and budget.speedup is not None:
            raise RecipeError(
                f"[values] and budget.speedup: kernel tables are read for values as the model has them, not for "
                f"{self.kind}; ask for bytes or max_ppl_increase, or leave [values] out"
            )


def form_of(pattern: NMPattern, values: Values | None, correction: CorrectionConfig | None = None) -> LayerForm:
    """What a sweep stores of every layer."""
    if values is None:
        return LayerForm(pattern, correction=correction)
    return LayerForm(pattern, values.kind, correction, None if values.group == "row" else values.group)


def check_prior(name: str, prior: Method, follower_name: str, follower: Method) -> None:
    """`RecipeError` unless `follower` can start from what `prior` makes. Both are given with their names."""
    if isinstance(prior, LearnedMethod):
        raise RecipeError(f"prior.name: {name} is learned itself; expected a one-shot method")
    if not isinstance(prior, LocalMethod) or prior.uses_prior:
        raise RecipeError(f"prior.name: {name} with these options starts from a mask itself")
    form = prior.correction
    goes_on = isinstance(follower, LearnedMethod) and follower.uses_prior_weights
    if form is None or (isinstance(follower, LearnedMethod) and goes_on and follower.correction == form):
        return
    advice = "leave prior.rank out"
    if goes_on and hasattr(follower, "rank") and isinstance(form, LowRankCorrection):
        advice = f"set method.rank={form.rank}, or {advice}"
    raise RecipeError(f"[prior]: makes a correction that {follower_name} with these options drops; {advice}")


class Budget(Strict):
    """How much of a model is pruned: layers whose sparsity costs most stay dense, as far as the budget goes.

    Exactly one way to ask is given. `bytes` is the most that prunable weights may take, as a share of what they take
    dense (0.75): sparse ones as [values] stores them, and with their corrections. `speedup` is how much faster one
    token must get through all prunable layers than with all of them dense (1.4), by the times of a machine's kernels,
    which have none of corrections. `max_ppl_increase` is how much higher than dense the perplexity may be, as a share
    of it (0.05); the result has the fewest bytes that were found. What the sparsity of each layer costs is measured on
    the first `windows` calibration windows.
    """

    bytes: float | None = Field(default=None, gt=0, lt=1)
    speedup: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    max_ppl_increase: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    windows: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Budget:
        given = [name for name in ASKS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(f"[budget]: found {' and '.join(given) or 'nothing'}, expected one of {', '.join(ASKS)}")
        return self

    @property
    def asked(self) -> dict[str, float]:
        """What is asked for, by its key."""
        return {name: value for name in ASKS if (value := getattr(self, name)) is not None}

    def check_learned(self, method: str, has_prior: bool) -> None:
        """`RecipeError` unless the learned `method` can have this budget; `has_prior` says whether a one-shot method
        makes sparse layers for it to start from, which are measured."""
        if not has_prior:
            raise RecipeError(f"[budget]: {method} with these options has no [prior] to measure layers with")
        if self.bytes is None:
            raise RecipeError(
                f"budget.{next(iter(self.asked))}: {method} spends budgets of bytes only (budget.bytes); meet this one "
                "with a one-shot recipe, and go on from its result (`prior`)"
            )


def asking(section: Any, budget: Mapping[str, float]) -> dict[str, Any]:
    """A [budget] `section` as TOML has it, if there is one, that asks for `budget` in place of what it asks for."""
    others = section if isinstance(section, dict) else {}
    return {**{key: value for key, value in others.items() if key not in ASKS}, **budget}
