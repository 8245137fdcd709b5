"""Results of measurements: one JSON file each, `<what>--<model>--<machine>--<yyyymmdd-hhmmss>`, never overwritten.

`schema` says what is in each, and where those are that newer ones have taken the place of.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparse_serve.bench.record import command, commit, run_metadata
from tests.bench import superseded
from tests.bench.schema import RESULTS


def save(what: str, model: str, result: dict[str, Any], replaces: Sequence[str] = ()) -> Path:
    """Write `result` with what `schema.Record` asks for; returns the file. Digests in it are those of the inputs.

    It takes the place of the records of its subject and machine that have the same values under the keys `replaces`, if
    there are any: those become lines of one file (`superseded`).
    """
    hardware = f"{platform.machine()}-{os.cpu_count()}core"
    subject = f"{what}--{model}--{hardware}"
    same = {key: result[key] for key in replaces}
    before = sorted(RESULTS.glob(f"{subject}--*.json")) if same else []
    older = [file.stem for file in before if same.items() <= _read(file).items()]
    created, path = _unused_name(subject)
    value = {
        **run_metadata(),
        "created": created.isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
        "inputs": {key.removesuffix("_digest"): digest for key, digest in result.items() if key.endswith("_digest")},
        "threads": torch.get_num_threads(),
        **({"supersedes": older} if older else {}),
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
    superseded.move(older, [path.stem], RESULTS)
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
    """Every record of `what` on `model` that holds, of any machine, oldest first."""
    files = sorted(RESULTS.glob(f"{what}--{model}--*.json"), key=lambda file: file.stem.rsplit("--", 1)[1])
    return list(map(_read, files))


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text("utf-8")))
