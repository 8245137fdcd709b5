"""Which layers a budget kept dense, and why: the record beside the weights of a result.

It may come from anywhere: its keys are these and no others, and numbers are finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskgen.core.companions import ALLOCATION_FILE
from maskgen.core.errors import FormatError, clip

_MAX_FILE_BYTES = 1 << 24

_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(ge=0)]
_Name = Annotated[str, Field(min_length=1, max_length=512)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class LayerCost(_Record):
    """Layers that are served as one: whether the budget keeps them dense, what their sparsity costs, and their size.

    `cost` is in nats per token, the layers' part of the KL divergence between the dense model and the one that is
    sparse throughout.
    """

    layers: tuple[_Name, ...] = Field(min_length=1)
    dense: bool
    cost: float
    dense_bytes: int = Field(ge=1)
    sparse_bytes: int = Field(ge=1)


class Look(_Record):
    """One choice on the way: its share of the dense bytes, and how much higher than dense the perplexity is."""

    bytes: _Share
    increase: float


class Proof(_Record):
    """What came out, on `windows` held-out windows that nothing was calibrated on and no choice was made with.

    `increase` is how much higher than dense the perplexity is, as a share of it; `attempt` says how many results were
    measured until one was good enough (1: the first).
    """

    increase: float
    dense_perplexity: _Positive
    perplexity: _Positive
    windows: int = Field(ge=1)
    attempt: int = Field(ge=1)


class Allocation(_Record):
    """How a budget was spent. `asked` for is one number: `bytes`, `speedup` or `max_ppl_increase` (see the recipe).

    `bytes` is what the prunable weights take now, as a share of what they take dense. `strict_kl` is the KL divergence
    from the dense model with every layer sparse, in nats per token, and `kl` that with the layers of the budget put
    back, before anything was solved again; for both each layer is solved by itself (symmetrically), and they were
    measured on `windows` calibration windows of `window_tokens`. `speedup` is how much faster one token gets through
    prunable layers than dense, where times were given.
    `search` are the choices looked at on `search_windows` held-out windows for a budget of perplexity, and `proof` is
    what came of it on others.
    """

    format_version: Literal[1] = 1
    asked: dict[_Name, _Positive]
    bytes: _Share
    strict_kl: _Positive
    kl: _Positive
    windows: int = Field(ge=1)
    window_tokens: int = Field(ge=1)
    layers: tuple[LayerCost, ...] = Field(min_length=1)
    speedup: _Positive | None = None
    search: tuple[Look, ...] = ()
    search_windows: int = Field(default=0, ge=0)
    proof: Proof | None = None

    @property
    def dense(self) -> frozenset[str]:
        """Names of the layers that the budget keeps dense."""
        return frozenset(name for layer in self.layers if layer.dense for name in layer.layers)

    def stored_as(self, sizes: Mapping[str, int]) -> Allocation:
        """The record of the same layers, when the sparse ones take other bytes: `sizes` by name, of layers that are
        served as one each for itself, or all of them under the name of the first."""
        layers = [
            layer
            if layer.dense
            else layer.model_copy(update={"sparse_bytes": sum(sizes.get(name, 0) for name in layer.layers)})
            for layer in self.layers
        ]
        taken = sum(layer.dense_bytes if layer.dense else layer.sparse_bytes for layer in layers)
        share = taken / sum(layer.dense_bytes for layer in layers)
        return self.model_copy(update={"layers": tuple(layers), "bytes": share})

    def describe(self) -> str:
        """One line for people."""
        kept = sum(layer.dense for layer in self.layers)
        asked = ", ".join(f"{key} {value:g}" for key, value in self.asked.items())
        line = (
            f"budget ({asked}): {kept} of {len(self.layers)} layers stay dense, {self.bytes:.4f} of the dense bytes of "
            f"prunable weights; KL {self.strict_kl:.3f} with all of them sparse, {self.kl:.3f} with these put back, on "
            f"{self.windows} calibration windows"
        )
        if self.speedup is not None:
            line += f"; one token is {self.speedup:.2f} times as fast through them as dense"
        if self.proof is None:
            return line
        return (
            f"{line}; perplexity {100 * self.proof.increase:+.1f} % on {self.proof.windows} held-out windows, searched "
            f"on {self.search_windows} others"
        )


def dense_layers(allocation: Allocation | None) -> frozenset[str]:
    """Names of the layers that a budget keeps dense, if there is one."""
    return frozenset() if allocation is None else allocation.dense


def stored_allocation(allocation: Allocation | None) -> dict[str, Any]:
    """Files to write beside the weights, by name: the record, if there was a budget."""
    return {} if allocation is None else {ALLOCATION_FILE: allocation.model_dump(mode="json")}


def read_allocation(model_dir: Path) -> Allocation | None:
    """How a budget was spent when this model was made; None for a model without one. `FormatError` for a damaged
    file."""
    path = model_dir / ALLOCATION_FILE
    if not path.is_file():
        return None
    return load_allocation(path)


def load_allocation(path: Path) -> Allocation:
    """Read one file; `FormatError` for anything that is not exactly a record."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_FILE_BYTES} are read; delete it")
    try:
        return Allocation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise FormatError(f"{path}: {clip(where)}: {problem['msg'].lower()}; delete it") from None
