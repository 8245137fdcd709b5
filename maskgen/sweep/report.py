"""How far a sweep is, and what it did and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from maskgen.sweep.reconstruct import Fitted

BLOCK_DONE = "block done"


@dataclass(frozen=True)
class Progress:
    """How far a run is: it works on block number `block` (from 0) of `blocks`, and has just finished `what`.

    `what` is "calibration inputs", the name of a layer, where the training of the block is ("reconstruction, ..."), or
    `BLOCK_DONE`. `elapsed_s` counts from the start of the run.
    """

    block: int
    blocks: int
    what: str
    elapsed_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did and cost.

    `targets` are the pruned layers by module name, `ignored` maps those that stay dense to the reason. `solve_s` has
    the seconds spent on each layer solved in this process. `million_weights` counts the weights of the targets.
    `resumed_blocks` were finished by an earlier process. `fitted` are the losses of each block that was trained, those
    of earlier processes included, by its number. With `corrects`, the targets were sparse before and got a correction.
    """

    targets: tuple[str, ...]
    ignored: Mapping[str, str]
    solve_s: Mapping[str, float]
    total_s: float
    million_weights: float
    peak_rss_bytes: int
    resumed_blocks: int
    fitted: Mapping[int, Fitted] = field(default_factory=dict)
    corrects: bool = False

    @property
    def s_per_million_weights(self) -> float:
        """Seconds of the whole sweep, forward passes included, per million weights in pruned layers."""
        return self.total_s / self.million_weights
