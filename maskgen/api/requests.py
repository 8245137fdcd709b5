"""Requests: what the functions of `maskgen` can be asked for, one frozen model each.

An unknown field, or a value that is not legal, is a `RequestError` that names the field. Defaults stand here and
nowhere else; the command line reads them for its help, so this file imports neither torch nor transformers.

Paths may be strings, and a single file may stand for a list of one. What decides a *result* is in the recipe; most
fields here are about files and machines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from maskgen.core.errors import RequestError, clip

Codes = Literal["int8", "fp8_e4m3", "int4"]
"""How kept weights can be stored in 8 or 4 bits; the names are those of `maskgen.core.values`."""

Group = Literal[64, 128, "row"]
"""How many kept int4 values share a scale; "row": all of a row."""

DEFAULT_GROUP: Final = 128


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _several(value: Any) -> Any:
    """One file for a list of one."""
    return (value,) if isinstance(value, str | os.PathLike) else value


def _overrides(value: Any) -> Any:
    """`{"method.damp": 0.05}` -> `("method.damp=0.05",)`: JSON values of recipes are TOML, too."""
    if isinstance(value, Mapping):
        try:
            return tuple(f"{key}={json.dumps(one, ensure_ascii=False, allow_nan=False)}" for key, one in value.items())
        except TypeError as error:
            raise ValueError(f"values must be numbers, strings, booleans or lists of them: {error}") from None
    return _several(value)


_Count = Annotated[int, Field(ge=1)]
_Model = Annotated[str, BeforeValidator(_text)]
_Files = Annotated[tuple[Path, ...], BeforeValidator(_several)]
_Overrides = Annotated[tuple[str, ...], BeforeValidator(_overrides)]


class Request(BaseModel):
    """Base of every request: frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # type checkers see the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise RequestError(_explain(type(self), error)) from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem as one line."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return f"{kind.__name__}: no field {clip(name)}; known fields are {sorted(kind.model_fields)}"
    if problem["type"] == "missing":
        return f"`{name}` is missing from {kind.__name__}; give it"
    return f"`{name}` {clip(problem['input'])}: {problem['msg'].lower()}"


class _FromRecipe(Request):
    """What starts from a recipe and a dense model.

    `recipe` is the name of a shipped recipe or the path of a .toml file, and `overrides` changes values of it:
    `{"method.damp": 0.05}`, or strings like "method.damp=0.05". `model` is a Hugging Face directory, a hub id or a
    GGUF file (see `maskgen.hf.gguf`), `data` are files of text or token ids, "hf:org/name" (see
    `maskgen.data.sources`), or "self" for text that the dense model writes (see `maskgen.data.own`). `bos` says whether
    windows of it begin with BOS, by default as the model's tokenizer does by itself (see `maskgen.data.bos`). `out` is
    the directory to write; it must not exist. `device` is where to compute: by default "cuda" if there is one, else
    "cpu".
    """

    recipe: str
    out: Path
    data: _Files = ()
    bos: bool | None = None
    overrides: _Overrides = ()
    device: str | None = None


class PruneRequest(_FromRecipe):
    """A one-shot run. `prior` are masks to start from: a mask file, or a sparse checkpoint of the same model, of which
    a method that trains blocks, one that adds a correction, and one with weights = "prior" takes the weights, too. With
    such a checkpoint `model` may be left out: the dense model is then looked for under the name that the checkpoint
    states, beside the checkpoint and among hub ids.

    One of three may be a budget, in place of the recipe's; layers whose sparsity costs most then stay dense, as far as
    that goes. `bytes` is the most that prunable weights may take, as a share of what they take dense. `speedup` is how
    much faster one token must get through them than dense, by the times that `sparse-serve tune` keeps in the directory
    `kernel_table`. `max_ppl_increase` is how much higher than dense the perplexity may be, as a share of it; the fewest
    bytes are searched for, and proven on other held-out windows.

    `masks_out` is a file to write the masks to as well. A model that vLLM does not have is refused, unless
    `allow_unserved` says that the result is for transformers only. With `keep_work` the directory OUT.work, from which
    a stopped run continues, is kept after success.
    """

    model: _Model | None = None
    prior: Path | None = None
    bytes: Annotated[float, Field(gt=0, lt=1)] | None = None
    speedup: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    kernel_table: Path | None = None
    max_ppl_increase: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    masks_out: Path | None = None
    allow_unserved: bool = False
    keep_work: bool = False


class LearnRequest(PruneRequest):
    """A run of a learned method. But for `teacher` and `minutes`, the fields change how it goes, never what comes out.

    Methods that train weights, or add a correction, go on from a sparse checkpoint, too, given as `model`: from its
    weights and its masks, while the dense model that it was made from stays the teacher and the base of the result.
    `teacher` is that dense model; without it, it is looked for under the name that the checkpoint states, beside the
    checkpoint and among hub ids. Its digest must be the one that the checkpoint states.

    `micro_batch` is windows per forward pass and bounds memory. `eval_every` is steps between looks at the held-out
    perplexity of the masks (by default five looks a run), `checkpoint_every` steps between checkpoints (by default one
    every five minutes), `keep_checkpoints` how many of the newest stay. `checkpoint_activations` computes activations
    again in the backward pass: less memory, more time. `shard` splits a run started by torchrun over its processes
    (FSDP2) instead of keeping a copy in each (DDP).

    With `minutes` the number of steps follows from the time, in place of the recipe's: as many as fit between the call
    and the result, found when a few passes have been timed. The recipe beside the result has the number.
    """

    teacher: _Model | None = None
    micro_batch: _Count = 8
    eval_every: _Count | None = None
    checkpoint_every: _Count | None = None
    keep_checkpoints: _Count = 2
    checkpoint_activations: bool = False
    shard: bool = False
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


TRAINING_FIELDS = tuple(name for name in LearnRequest.model_fields if name not in PruneRequest.model_fields)
"""Fields that a one-shot method has no use for."""


class PermuteRequest(_FromRecipe):
    """Reorder a dense model's hidden neurons by the scores of `recipe`: "ria", "wanda" or "magnitude"."""

    model: _Model


class CompressRequest(Request):
    """Apply `masks` (a mask file, or a sparse checkpoint) to the dense `model` they were made for.

    `values` is how kept weights are stored: as they are ("float"), as 8-bit codes with a scale per row, or as 4-bit
    ones with a scale for each `group` of them (None: 128).
    """

    model: _Model
    masks: Path
    out: Path
    values: Literal["float"] | Codes = "float"
    group: Group | None = None


class QuantiseRequest(Request):
    """Write the sparse checkpoint `model`, which has float values, again with 8-bit or 4-bit ones.

    Each value is rounded to the nearest code; of int4, `group` values share a scale (None: 128). With `data`, and `bos`
    as for runs of a recipe, int4 codes are chosen on `device` for what the layers put out on this text.
    """

    model: Path
    out: Path
    values: Codes
    group: Group | None = None
    data: _Files = ()
    bos: bool | None = None
    device: str | None = None


class ConvertRequest(Request):
    """Write `model`, a checkpoint of another tool whose weights are sparse (`maskgen.export.convert`), as ours.

    It is a Hugging Face directory or a hub id. `masks` are those of MaskLLM (.npz), and `model` is then the dense model
    that they are for. `pattern` is what weights with zeros in them are compared with.
    """

    model: _Model
    out: Path
    masks: Path | None = None
    pattern: str = "2:4"


class DecompressRequest(Request):
    """Write `model`, a sparse checkpoint or a GGUF file, as an ordinary dense directory."""

    model: Path
    out: Path


class EvaluateRequest(Request):
    """Perplexity of `model`, dense or sparse, on one or several sources of text or token ids.

    With `against`, the dense model that it was made from, both are loaded and compared (`maskgen.core.divergence`).
    Windows of `window_tokens` tokens (by default 2048, or as many as the model reads) start every `stride_tokens` (by
    default they do not overlap), each with BOS in front if `bos` (by default as the tokenizer does by itself), and only
    the first `max_windows` are scored. `dtype` "auto" is the stored one. `batch` windows share a forward pass. With
    `keep` the comparison with `against` is also kept in the directory `model`, as the measurement that `inspect` shows;
    the texts must be others than those the model was made with.
    """

    model: _Model
    data: Annotated[_Files, Field(min_length=1)]
    against: _Model | None = None
    keep: bool = False
    window_tokens: int | None = None
    stride_tokens: int | None = None
    bos: bool | None = None
    max_windows: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch: _Count = 1
    device: str | None = None


class InspectRequest(Request):
    """What the directory `model` holds; a dense one is compared with `pattern`."""

    model: Path
    pattern: str = "2:4"


class ReportRequest(Request):
    """Compare learned runs in one HTML page, `out`; an older page is replaced.

    Each of `runs` is an output directory, the OUT.work of a run that is not finished, or a log file.
    """

    runs: Annotated[_Files, Field(min_length=1)]
    out: Path = Path("report.html")


class DemoRequest(Request):
    """Make a chat model and text in `out`; by default sparse-serve/demo-v8 in the user's cache directory."""

    out: Path | None = None
