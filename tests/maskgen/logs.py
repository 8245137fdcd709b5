"""Logs of runs that never were, written with the records of the real ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskgen.train.log import TrainLog
from maskgen.train.loop import HeldOut
from maskgen.train.step import TrainingStep

LAYERS = {f"model.layers.{block}.{kind}": [8, 16] for block in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj")}
MASKS = {name: {"agreement": 0.75, "patterns": {"1100": 3, "0011": 1}} for name in LAYERS}


def header(**changes: Any) -> dict[str, Any]:
    """A first line. `method`, `pattern` and the keys of [train] go to their places in the recipe."""
    train = {"steps": 4, "batch": 2, "window_tokens": 32, "seed": 0, "lr": 1e-3, "dtype": "bfloat16"}
    train.update({key: changes.pop(key) for key in list(changes) if key in train})
    recipe = {
        "pattern": changes.pop("pattern", "2:4"),
        "method": {"name": changes.pop("method", "maskllm"), "options": {"scale": 100.0}},
        "train": train,
    }
    digests = {kind: f"sha256:{kind * 8}" for kind in ("recipe", "base", "data", "prior")}
    return {
        "recipe": recipe,
        "digests": {**digests, **changes.pop("digests", {})},
        "model": "tiny",
        "data": ["text.txt"],
        "heldout_windows": 6,
        "layers": LAYERS,
        "reference": "prior",
        "torch": "2.0",
        "hardware": {"device": "cpu", "name": "x86_64", "threads": 1},
        **changes,
    }


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A step that took 2 s, 64 tokens, at a loss of 5 - number / 10."""
    loss = 5 - number / 10
    values = asdict(TrainingStep(number, 4, loss, loss, 0.5, 1.0, 1e-3, 64, 1.0 + 2 * number, 3_000_000 * number))
    return {"kind": "step", **values, **changes}


def look(number: int, perplexity: float, dense: float | None = None, **changes: Any) -> dict[str, Any]:
    """An evaluation after step `number`, which took half a second."""
    values = asdict(HeldOut(number, 1.0, perplexity, 1 - number / 10, 0.01, 1.5 + 2 * number, None, dense))
    return {"kind": "eval", **values, **changes}


def whole() -> list[dict[str, Any]]:
    """Every line of a finished run but the first."""
    return [look(0, 60.0, 50.0), step(1), step(2), look(2, 58.0), step(3), step(4), look(4, 55.0), layers()]


def layers(masks: Mapping[str, Any] = MASKS) -> dict[str, Any]:
    """The last line of a finished run."""
    return {"kind": "layers", "step": 4, "layers": masks}


def write(path: Path, records: Iterable[Mapping[str, Any]] | None = None, **changes: Any) -> Path:
    """A log at `path`, as the driver writes it; `changes` go to the header."""
    with TrainLog(path, header(**changes), 0) as log:
        for record in whole() if records is None else records:
            log.add(record["kind"], {key: value for key, value in record.items() if key != "kind"})
    return path


def write_raw(path: Path, *records: object) -> Path:
    """Lines as they are given."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
