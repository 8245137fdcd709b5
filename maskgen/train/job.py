"""What a learned run is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskgen.core.mask import MaskSet
from maskgen.export.allocation import Allocation
from maskgen.hf.planning import Planned
from maskgen.recipes.recipe import Recipe
from maskgen.sweep.workdir import work_dir
from maskgen.train.budget import Budget
from maskgen.train.loop import Cadence
from maskgen.train.start import Start


@dataclass(frozen=True)
class Job:
    """A learned run, settled and checked. `recipe` has its windows' length; `prior` are masks that were given, `start`
    is a sparse checkpoint that was, to go on from, and `allocation` what a budget keeps dense, once that is settled.

    `label` names the dense model in `model_dir` for people, `planned` says what is pruned of it. `bos` says whether
    windows of text begin with BOS (None: as the tokenizer does by itself). `out` and `masks_out` are written. The rest
    is about the machine, and changes no bit of the result; but with `budget`, as many steps are made as fit into that.
    """

    recipe: Recipe
    model_dir: Path
    label: str
    planned: Planned
    data: Sequence[Path]
    out: Path
    bos: bool | None = None
    masks_out: Path | None = None
    prior: MaskSet | None = None
    start: Start | None = None
    allocation: Allocation | None = None
    device: str = "cpu"
    cadence: Cadence = field(default_factory=Cadence)
    checkpoint_activations: bool = False
    shard: bool = False
    budget: Budget | None = None

    @property
    def work(self) -> Path:
        """Where the run keeps what it has done so far."""
        return work_dir(self.out)
