"""Which kernels serve a sparse layer, at which number of tokens: measured on this machine, and remembered.

One token is bound by the bytes of the weight, a prompt of a thousand by arithmetic, and which kernel is best at which
number changes with the shape and the machine; so nobody guesses. For every number of tokens of `BUCKETS`, all willing
kernels and torch's dense linear race on random weights of the layer's shape (`race`), and `decide` makes a plan:

1. the one kernel that is never slower than dense, within `SLACK` (what two runs of the same thing differ by); of
   several the one with the best speedup over all buckets, in the geometric mean;
2. if none keeps up everywhere, the one kernel, or the pair (one for few tokens and one for many), that is least behind
   where it is furthest behind. A pair takes the memory of two layouts: on GPUs only, and it has to be better by more
   than `SLACK`.

What was measured is kept in the user's cache, one file per kind of layer and machine. Its name holds the digest of the
kernels' code, the device, the number of threads and torch's version: a new kernel never meets an old figure.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from maskgen.core.digest import digest_files, digest_json
from maskgen.core.errors import SparseError
from maskgen.core.files import read_json, write_json
from sparse_serve.kernels import LinearSpec, choose, no_kernel, willing
from sparse_serve.plan import Plan, Step
from sparse_serve.race import DENSE, device_name, race

AUTO = "auto"
BUCKETS = (1, 4, 16, 32, 64, 256, 1024)
"""Numbers of tokens that are measured. Each stands for those above the one before it, the last for all others too."""

LAYOUTS = {"cuda": 2, "cpu": 1}
"""Layouts of a weight that may be in memory. On a CPU one layout is made for every number of tokens."""

SLACK = 1.05
FORMAT = 1

Seconds = Mapping[int, Mapping[str, float]]
"""Seconds of one call, by number of tokens and contender; all contenders at every number, `dense` among them."""


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


def decide(seconds: Seconds, layouts: int = 2) -> tuple[Bucket, ...]:
    """The best kernel, or if there may be two layouts pair of kernels, by the rule at the top."""
    names = sorted(set(next(iter(seconds.values()))) - {DENSE})
    best = min(combinations(names, 1), key=lambda team: _rank(seconds, team))
    pairs = sorted(combinations(names, 2), key=lambda team: _rank(seconds, team))
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


def choice_for(spec: LinearSpec, wanted: str = AUTO, measure_again: bool = False) -> Choice:
    """The kernel asked for; else the only one willing; else what was measured, now or before.

    Raises `KernelError` if the kernel asked for refuses, or every kernel does, with every reason.
    """
    if wanted != AUTO:
        choose(spec, wanted)
        return Choice(spec, Plan.of(wanted))
    kernels, refused = willing(spec)
    if not kernels:
        raise no_kernel(spec, refused)
    if len(kernels) == 1 and not measure_again:
        return Choice(spec, Plan.of(*kernels), refused=refused)
    facts = _facts(spec)
    path = _path(facts)
    seconds = None if measure_again else _recall(path, set(kernels))
    if seconds is None:
        seconds = race(spec, kernels, BUCKETS)
        _keep(path, facts, seconds)
    buckets = decide(seconds, LAYOUTS[spec.device_type])
    return Choice(spec, plan_of(buckets), buckets, refused)


def _rank(seconds: Seconds, team: Sequence[str]) -> tuple[float, float]:
    """Worst time against dense, of which anything below `SLACK` is as good; then the mean of the logarithms."""
    behind = [min(times[name] for name in team) / times[DENSE] for times in seconds.values()]
    return max(SLACK, max(behind)), sum(map(math.log, behind))


def _facts(spec: LinearSpec) -> dict[str, Any]:
    """All that a figure depends on."""
    here = Path(__file__).parent
    code = digest_files([*here.glob("*.so"), *(here / "kernels").glob("*.py"), here / "race.py"])
    return {
        "layer": {name: value if isinstance(value, int) else str(value) for name, value in vars(spec).items()},
        "code": code,
        "device": device_name(spec.device_type),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "tokens": list(BUCKETS),
    }


def _path(facts: Mapping[str, Any]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sparse-serve" / f"kernels-{FORMAT}" / f"{digest_json(facts).removeprefix('sha256:')[:32]}.json"


def _recall(path: Path, contenders: set[str]) -> Seconds | None:
    """What was measured before; None if nothing was, or if the file is not what `_keep` writes."""
    if not path.exists():
        return None
    try:
        stored = read_json(path)["seconds"]
        seconds = {tokens: {name: float(s) for name, s in stored[str(tokens)].items()} for tokens in BUCKETS}
    except (SparseError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    whole = all(set(times) == contenders | {DENSE} and min(times.values()) > 0 for times in seconds.values())
    return seconds if whole else None


def _keep(path: Path, facts: Mapping[str, Any], seconds: Seconds) -> None:
    """Several ranks may write the same file: each writes it whole. A cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        write_json(path, {**facts, "seconds": {str(tokens): dict(s) for tokens, s in seconds.items()}})
