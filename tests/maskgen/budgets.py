"""What the tests of budgets share: short requests, and the bytes of what came of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import maskgen
from maskgen.export.allocation import Allocation

SHORT: dict[str, Any] = {"calibration.window_tokens": 32, "calibration.samples": 6}
LOW_RANK: dict[str, Any] = {"method.rank": 3, "method.rounds": 2}


def request(dense: Path, text: Path, out: Path, recipe: str = "sparsegpt", **changes: Any) -> maskgen.LearnRequest:
    overrides = {**SHORT, **changes.pop("overrides", {})}
    given = {"recipe": recipe, "model": dense, "data": text, "out": out, **changes, "overrides": overrides}
    return maskgen.LearnRequest(**given)


def spend(*args: Any, heard: Callable[[Any], None] = lambda event: None, **changes: Any) -> Allocation:
    made = maskgen.run(request(*args, **changes), heard)
    assert isinstance(made, maskgen.PruneResult) and made.allocation is not None
    return made.allocation


def stored_share(out: Path) -> float:
    """The bytes of prunable weights in a checkpoint, as a share of those that they take dense."""
    report = maskgen.inspect(maskgen.InspectRequest(model=out))
    blocks = [layer for layer in report.layers if ".layers." in layer.name]
    stored, whole = (sum(getattr(layer, key) for layer in blocks) for key in ("stored_bytes", "dense_bytes"))
    return float(stored / whole)
