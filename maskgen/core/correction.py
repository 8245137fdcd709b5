"""The forms of a correction y += S (X x), as the manifest of a checkpoint states them.

    kind      S, X                    what X is
    pooled    [O, I/k], [I/k, I]      sums of k consecutive inputs each, not stored; or trained and stored (SLoRB)
    lowrank   [O, r], [r, I]          any matrix, stored: S X is any matrix of rank r (EoRA)

Legend: O = out features, I = in features, K = columns of S, which are the rows of X.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from maskgen.core.errors import FormatError, clip
from maskgen.core.files import check_keys

_WHERE = "quantization_config: correction"
_MOST = 1 << 20
FIXED, TRAINED = "fixed", "trained"


@dataclass(frozen=True)
class CorrectionConfig(ABC):
    """The form of the correction that every target layer of a checkpoint has."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def stores_pool(self) -> bool:
        """Whether X is stored."""

    @abstractmethod
    def columns(self, in_features: int, name: str) -> int:
        """K for a layer with I inputs; `FormatError` naming the layer if it cannot have this form."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The JSON object in the manifest."""

    def shapes(self, out_features: int, in_features: int, name: str) -> tuple[list[int], list[int] | None]:
        """Shapes of S and of a stored X for a weight `[O, I]`; `FormatError` naming the layer if it cannot have this
        form."""
        columns = self.columns(in_features, name)
        return [out_features, columns], [columns, in_features] if self.stores_pool else None


@dataclass(frozen=True)
class PooledCorrection(CorrectionConfig):
    """S is `[O, I / segment]`. With `pool` "fixed", X adds up `segment` consecutive inputs each and is not stored; with
    "trained", X is a stored matrix `[I / segment, I]`."""

    kind = "pooled"
    segment: int
    pool: str

    def __post_init__(self) -> None:
        _check_count(self.segment, "segment")
        if self.pool not in (FIXED, TRAINED):
            raise FormatError(f"{_WHERE}.pool {clip(self.pool)}, expected {FIXED!r} or {TRAINED!r}")

    @property
    def stores_pool(self) -> bool:
        """Whether it was trained."""
        return self.pool == TRAINED

    def columns(self, in_features: int, name: str) -> int:
        """One for each segment of the inputs, which must be whole."""
        if in_features % self.segment:
            raise FormatError(
                f"{name}: {in_features} input features are no multiple of the correction's segment of {self.segment}"
            )
        return in_features // self.segment

    def to_dict(self) -> dict[str, Any]:
        """`kind`, `segment` and `pool`."""
        return {"kind": self.kind, "segment": self.segment, "pool": self.pool}


@dataclass(frozen=True)
class LowRankCorrection(CorrectionConfig):
    """S is `[O, rank]` and X `[rank, I]`, both stored; `rank` is at most O and I of every target."""

    kind = "lowrank"
    rank: int

    def __post_init__(self) -> None:
        _check_count(self.rank, "rank")

    @property
    def stores_pool(self) -> bool:
        """Always."""
        return True

    def columns(self, in_features: int, name: str) -> int:
        """The rank."""
        return self.rank

    def shapes(self, out_features: int, in_features: int, name: str) -> tuple[list[int], list[int] | None]:
        """As for every form; a matrix has no rank above its smaller dimension."""
        if self.rank > min(out_features, in_features):
            raise FormatError(
                f"{name}: the correction's rank of {self.rank} is too large for a weight [{out_features}, "
                f"{in_features}]; expected at most {min(out_features, in_features)}"
            )
        return super().shapes(out_features, in_features, name)

    def to_dict(self) -> dict[str, Any]:
        """`kind` and `rank`."""
        return {"kind": self.kind, "rank": self.rank}


def read_correction(value: Any) -> CorrectionConfig | None:
    """The form in the manifest's JSON object, or None for null; `FormatError` for anything else."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"{_WHERE} {clip(value)}, expected an object or null")
    kind = value.get("kind", PooledCorrection.kind)  # what is missing is reported by name
    if kind == LowRankCorrection.kind:
        check_keys(value, ("kind", "rank"), _WHERE)
        return LowRankCorrection(value["rank"])
    if kind != PooledCorrection.kind:
        raise FormatError(
            f"{_WHERE}.kind {clip(kind)}, expected {PooledCorrection.kind!r} or {LowRankCorrection.kind!r}"
        )
    check_keys(value, ("kind", "segment", "pool"), _WHERE)
    return PooledCorrection(value["segment"], value["pool"])


def _check_count(value: int, name: str) -> None:
    if type(value) is not int or not 1 <= value <= _MOST:
        raise FormatError(f"{_WHERE}.{name} {clip(value)}, expected a whole number from 1 to {_MOST}")
