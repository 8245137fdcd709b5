"""N:M patterns: `n` weights KEPT in every group of `m` consecutive input columns.

The sparse tensor core contracts over the input dimension, so groups run along the columns of a weight `[out, in]`.
In the literature `n` counts kept weights in some papers and removed ones in others; they agree only at 50 %. Here it
is always the kept ones, and `mask_from_scores` is the only place in the project that turns scores into a mask.

Legend: O = out features, I = in features, G = groups per row (I / m), m = columns per group.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgen.core.errors import PatternError, clip

MAX_GROUP = 64
"""Largest `m` accepted. Hardware and literature stop at 16; the bound keeps a hostile pattern from costing anything."""

MAX_CANDIDATES = 1024
"""Most patterns of one group that are enumerated (4:8 has 70, 8:16 has 12,870)."""

_TEXT = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")


@dataclass(frozen=True)
class NMPattern:
    """Keep `n` of every `m` consecutive columns; `1 <= n < m <= 64`."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 1 <= self.n < self.m <= MAX_GROUP:
            raise PatternError(
                f"pattern {clip(self.n)}:{clip(self.m)}: expected whole numbers with 1 <= n < m <= {MAX_GROUP}, where "
                "n is the number of weights KEPT per group of m; for example 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """Read `"2:4"`. Raises `PatternError` for anything else."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise PatternError(f"pattern {clip(text)}: expected 'n:m' such as '2:4' (n kept of every m columns)")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Fraction of the weights that stay."""
        return self.n / self.m

    @property
    def column_multiple(self) -> int:
        """`in_features` must be a multiple of this, so that groups and bitmask bytes end together."""
        return math.lcm(8, self.m)

    def kept_columns(self, in_features: int) -> int:
        """Number of values stored per row of `in_features` columns."""
        return in_features * self.n // self.m

    @property
    def candidate_count(self) -> int:
        """Number of legal ways to fill a group: m choose n."""
        return math.comb(self.m, self.n)

    def candidates(self) -> Tensor:
        """Every legal group as a bool `[P, m]`, P = m choose n: the project's only enumeration of patterns.

        The order is part of the mask file's format: by the columns kept, in lexicographic order. For 2:4 that is 1100,
        1010, 1001, 0110, 0101, 0011. Raises `PatternError` for patterns with more than 1,024 candidates.
        """
        if self.candidate_count > MAX_CANDIDATES:
            raise PatternError(
                f"pattern {self} has {self.candidate_count} candidates per group, at most {MAX_CANDIDATES} are "
                "enumerated; choose a smaller group"
            )
        kept = itertools.combinations(range(self.m), self.n)
        return torch.tensor([[column in columns for column in range(self.m)] for columns in kept], device="cpu")

    def check_columns(self, in_features: int, name: str = "weight") -> None:
        """Raise `PatternError` unless a row of `in_features` columns can be packed."""
        if in_features <= 0 or in_features % self.column_multiple:
            raise PatternError(
                f"{name}: in_features {in_features} is not a positive multiple of {self.column_multiple}, which "
                f"pattern {self} needs (groups of {self.m}, mask bytes of 8); keep this layer dense"
            )

    def mask_from_scores(self, scores_OI: Tensor) -> Tensor:
        """Keep the `n` highest scores of every group; ties go to the lower column.

        Takes scores `[O, I]` of any float dtype (infinities allowed) and returns a bool mask `[O, I]` with exactly `n`
        True per group. Ranks are counted pairwise, so the result does not depend on a sort's stability, its device, or
        the number of threads; the workspace is `2 * O * I / m` booleans beside the `O * I` bytes of ranks.

        Raises `PatternError` on NaN or when I is not a multiple of m.
        """
        if scores_OI.ndim != 2 or scores_OI.shape[1] % self.m:
            raise PatternError(f"scores of shape {tuple(scores_OI.shape)}: expected [O, I], I a multiple of {self.m}")
        if torch.isnan(scores_OI).any():
            raise PatternError("scores hold NaN: no order exists; look for NaN in the weights or calibration data")
        scores_OGm = scores_OI.reshape(scores_OI.shape[0], scores_OI.shape[1] // self.m, self.m)
        rank_mOG = torch.zeros((self.m, *scores_OGm.shape[:2]), dtype=torch.uint8, device=scores_OI.device)
        for low in range(self.m):
            for high in range(low + 1, self.m):
                high_wins_OG = scores_OGm[..., high] > scores_OGm[..., low]
                rank_mOG[low] += high_wins_OG
                rank_mOG[high] += ~high_wins_OG
        return (rank_mOG < self.n).permute(1, 2, 0).reshape(scores_OI.shape)

    def check_mask(self, mask_OI: Tensor, name: str = "mask") -> None:
        """Raise `PatternError` naming the first group that does not keep exactly `n`."""
        if mask_OI.dtype != torch.bool or mask_OI.ndim != 2 or mask_OI.shape[1] % self.m:
            raise PatternError(
                f"{name}: mask of dtype {mask_OI.dtype} and shape {tuple(mask_OI.shape)}: expected bool [O, I] with "
                f"I a multiple of {self.m}"
            )
        kept_OG = mask_OI.reshape(mask_OI.shape[0], mask_OI.shape[1] // self.m, self.m).sum(-1, dtype=torch.uint8)
        wrong_OG = kept_OG != self.n
        if wrong_OG.any():
            row, group = (int(index) for index in wrong_OG.nonzero()[0])
            raise PatternError(
                f"{name}: row {row}, columns {group * self.m}..{group * self.m + self.m - 1} keep "
                f"{int(kept_OG[row, group])} weights, expected {self.n} ({int(wrong_OG.sum())} of "
                f"{wrong_OG.numel()} groups break {self})"
            )
