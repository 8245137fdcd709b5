"""The log of a training run: one JSON object per line, the same whether or not the run was ever killed.

    {"kind": "header", ...}     once: recipe, digests, layers, hardware
    {"kind": "step", ...}       every optimiser step
    {"kind": "eval", ...}       now and then: held-out loss with hard masks, and how the masks moved
    {"kind": "layers", ...}     at the end: every layer's masks

`peak_memory_bytes` of a step is process 0's: of its GPU, else of the host.

Lines are appended and flushed to disk before each checkpoint. A run that goes on from a checkpoint cuts away the lines
after its step and writes them again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from maskgen.core.errors import FormatError
from maskgen.core.failures import explained
from maskgen.core.files import fsync_path, temporary_sibling

LOG_FILE = "maskgen_log.jsonl"
"""Its name beside the weights of the result."""

WORK_LOG_FILE = "log.jsonl"
"""Its name in OUT.work, while the run is at work."""


class TrainLog:
    """Appends to `path`, which starts with `header`. Lines of steps after `step` are cut away first."""

    def __init__(self, path: Path, header: Mapping[str, Any], step: int) -> None:
        self.path = path
        kept = read(path, step) if step and path.is_file() else [{"kind": "header", **header}]
        with temporary_sibling(path) as temporary:
            temporary.write_text("".join(_line(record) for record in kept), "utf-8")
            fsync_path(temporary)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written is tried again here; that must not hide the error that says so.
        with explained(self.path) if error is None else suppress(OSError):
            self._file.close()

    def add(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append one line; fields that are None are left out."""
        line = _line({"kind": kind, **{key: value for key, value in record.items() if value is not None}})
        with explained(self.path):
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        """Everything so far is on disk when this returns."""
        with explained(self.path):
            os.fsync(self._file.fileno())


def read(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of a log, up to those of step `last_step`. `FormatError` for what is no log.

    A line that a killed process left half written counts as absent.
    """
    *lines, _unfinished = path.read_text("utf-8", errors="replace").split("\n")
    records = [_record(line, path) for line in lines]
    if not records or records[0].get("kind") != "header":
        raise FormatError(f"{path}: not a log of maskgen: it does not begin with a header")
    return [record for record in records if last_step is None or record.get("step", 0) <= last_step]


def _record(line: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a log of maskgen: {error}") from None
    if not isinstance(record, dict):
        raise FormatError(f"{path}: not a log of maskgen: a line holds no object")
    return record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
