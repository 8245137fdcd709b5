"""Results of measurements: one JSON file each, `<what>--<model>--<hardware>--<yyyymmdd-hhmmss>`, never overwritten.

`schema` says what is in each.
"""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparse_serve.bench.record import command, commit, run_metadata
from tests.bench.schema import RESULTS


def save(what: str, model: str, result: dict[str, Any]) -> Path:
    """Write `result` with what `schema.Record` asks for; returns the file. Digests in it are those of the inputs."""
    hardware = f"{platform.machine()}-{os.cpu_count()}core"
    created, path = _unused_name(f"{what}--{model}--{hardware}")
    value = {
        **run_metadata(),
        "created": created.isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
        "inputs": {key.removesuffix("_digest"): digest for key, digest in result.items() if key.endswith("_digest")},
        "threads": torch.get_num_threads(),
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
    return path


def _unused_name(stem: str) -> tuple[datetime, Path]:
    """A time, and a file named after its second, of which there is none yet; waits for the next second if need be."""
    while True:
        created = datetime.now(UTC)
        path = RESULTS / f"{stem}--{created:%Y%m%d-%H%M%S}.json"
        if not path.exists():
            return created, path
        time.sleep(0.1)


def load(what: str, model: str) -> list[dict[str, Any]]:
    """Every result of `what` on `model`, on any hardware, oldest first."""
    files = sorted(RESULTS.glob(f"{what}--{model}--*.json"), key=lambda file: file.stem.rsplit("--", 1)[1])
    return [json.loads(file.read_text("utf-8")) for file in files]
