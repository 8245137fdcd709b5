"""Base class of the methods that add a correction to a model which is sparse already.

`maskgen.sweep.driver` walks the model block by block, as for a one-shot method. Masks and stored values stay as they
are, bit for bit: what comes of a layer is a small dense term y += S (X x) beside it, in the form that the method names.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maskgen.core.correction import CorrectionConfig
from maskgen.methods import Correction, LayerMethod


@dataclass(frozen=True)
class CorrectionMethod(LayerMethod, ABC):
    """Makes the correction of one layer after the other."""

    @property
    def uses_prior(self) -> bool:
        """It starts from a sparse checkpoint."""
        return True

    @property
    @abstractmethod
    def correction(self) -> CorrectionConfig:
        """The form of the correction that every layer gets, with these options."""

    @abstractmethod
    def solve(self, weight_OI: Tensor, served_OI: Tensor, stats: Any) -> Correction:
        """The float32 correction of one layer.

        `weight_OI` is its dense weight, `served_OI` the one that is served (zero where pruned, codes as the floats they
        stand for), both in float32; `stats` is what `observe` returned last. No argument may be changed. Raises
        `NumericalError` when the statistics cannot be used.
        """
