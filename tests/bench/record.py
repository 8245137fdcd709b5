"""Results of measurements: one JSON file each, `<what>--<model>--<hardware>--<yyyymmdd-hhmmss>`, never overwritten."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from sparse_serve.bench.record import commit

RESULTS = Path(__file__).parent / "results"


def save(what: str, model: str, result: dict[str, Any]) -> Path:
    """Write `result` with commit, versions and hardware; returns the file."""
    created = datetime.now(UTC)
    hardware = f"{platform.machine()}-{os.cpu_count()}core"
    value = {
        "created": created.isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{what}--{model}--{hardware}--{created:%Y%m%d-%H%M%S}.json"
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
    return path


def load(what: str, model: str) -> list[dict[str, Any]]:
    """Every result of `what` on `model`, on any hardware, oldest first."""
    files = sorted(RESULTS.glob(f"{what}--{model}--*.json"), key=lambda file: file.stem.rsplit("--", 1)[1])
    return [json.loads(file.read_text("utf-8")) for file in files]
