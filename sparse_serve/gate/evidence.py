"""What the gate measured: raw numbers, and what is allowed. The checks turn these into verdicts.

A gate has two targets: the `base`, which is what there is, and the `candidate`, which may replace it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from maskgen.core.divergence import Divergence
from maskgen.core.perplexity import Perplexity
from sparse_serve.engine import EngineInfo
from sparse_serve.tuning.parity_file import KernelParity

TARGETS = ("base", "candidate")


@dataclass(frozen=True)
class Limits:
    """What is allowed. Fractions, not percent: `max_ppl_increase=0.05` allows 5 %. None: not judged.

    `parity_tolerance` bounds the relative difference between served and offline perplexity of the same weights. `alpha`
    is the significance level of the one-sided tests of quality and divergence. `max_kl` (nats per token) and
    `max_flips` (share of positions) bound how far the candidate's predictions are from the base's. Speed may get worse
    by `max_slowdown`, or by `floor_ms` if that is more, tested at `speed_alpha`; it passes only where a regression at
    the limit would pass with probability `speed_pass_alpha`. A task's accuracy may drop by `max_task_drop`, tested at
    `task_alpha`.
    """

    max_ppl_increase: float = 0.05
    parity_tolerance: float = 0.001
    alpha: float = 0.05
    max_kl: float | None = None
    max_flips: float | None = None
    max_slowdown: float = 0.03
    floor_ms: float = 1.0
    speed_alpha: float = 0.02
    speed_pass_alpha: float = 0.001
    max_task_drop: float = 0.01
    task_alpha: float = 0.05


@dataclass(frozen=True)
class Scores:
    """One target on one text: perplexity as served, and offline (transformers) where the weights are at hand."""

    served: Perplexity
    offline: Perplexity | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {"served": self.served.to_dict(), "offline": None if self.offline is None else self.offline.to_dict()}


@dataclass(frozen=True)
class TextEvidence:
    """Both targets on the same windows of the text called `text`.

    `divergence` is the candidate's from the base; `is_exact` if over the whole vocabulary, else over the most likely
    tokens with all others taken as one, which can only make it smaller.
    """

    text: str
    base: Scores
    candidate: Scores
    divergence: Divergence | None = None
    is_exact: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, raw samples included."""
        return {
            "text": self.text,
            "base": self.base.to_dict(),
            "candidate": self.candidate.to_dict(),
            "divergence": None if self.divergence is None else {**self.divergence.to_dict(), "exact": self.is_exact},
        }


@dataclass(frozen=True)
class TaskEvidence:
    """Which samples of a task each target answers correctly, in the same order. `samples_digest` names the samples."""

    task: str
    base: Sequence[bool]
    candidate: Sequence[bool]
    samples_digest: str = ""


@dataclass(frozen=True)
class HostReading:
    """What else went on while a round was measured.

    `steal` is the share of the processors' time that another virtual machine had, `foreign` the share that processes
    other than the gate's had, `probe_s` the seconds that a fixed computation took, before each run.
    """

    steal: float
    foreign: float
    probe_s: Sequence[float]


@dataclass(frozen=True)
class MemoryReading:
    """Memory of a served target (`footprint`): `peak_rss_bytes` is the sum of its processes' peaks, `gpu_bytes` what it
    held of the GPUs, `weight_bytes` the size of its files. None: not known.
    """

    processes: int
    peak_rss_bytes: int
    gpu_bytes: int | None = None
    weight_bytes: int | None = None


@dataclass(frozen=True)
class SpeedRun:
    """One target under one load: a number per answered request, and for `itl_ms` per arrival of tokens after the
    first one's.

    `failed` counts requests that failed, or stopped before their last token.
    """

    target: str
    ttft_ms: Sequence[float]
    itl_ms: Sequence[float]
    e2e_ms: Sequence[float]
    duration_s: float
    output_tokens: int
    failed: int = 0


@dataclass(frozen=True)
class SpeedRound:
    """Runs under one load of `clients` clients: four, in the order base, candidate, candidate, base, or as many of each
    as were read from files; then nobody watched the `host`.
    """

    number: int
    clients: int
    runs: Sequence[SpeedRun]
    host: HostReading | None


@dataclass(frozen=True)
class SpeedEvidence:
    """All rounds, and the names of the metrics to judge (`checks/speed.py`).

    `slo_ttft_ms` and `slo_e2e_ms` say which requests goodput counts. `requests` are those of each client in a run.
    """

    rounds: Sequence[SpeedRound]
    metrics: Sequence[str]
    slo_ttft_ms: float | None = None
    slo_e2e_ms: float | None = None
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured; a check whose part is missing has nothing to judge.

    `packed_fraction` is the smallest resident fraction of dense that the candidate's pattern and dtype allow, None if
    it is no sparse checkpoint. Engines are those the gate started. `kernels` has, for each role whose sparse layers the
    gate served, how exact their kernels are. `memory`, by role, is of targets whose processes are on this host.
    """

    texts: Sequence[TextEvidence] = ()
    base_engine: EngineInfo | None = None
    candidate_engine: EngineInfo | None = None
    packed_fraction: float | None = None
    kernels: Mapping[str, Sequence[KernelParity]] = field(default_factory=dict)
    memory: Mapping[str, MemoryReading] = field(default_factory=dict)
    speed: SpeedEvidence | None = None
    tasks: Sequence[TaskEvidence] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, raw samples included."""
        return {
            "texts": [text.to_dict() for text in self.texts],
            "engines": {"base": _engine(self.base_engine), "candidate": _engine(self.candidate_engine)},
            "packed_fraction": self.packed_fraction,
            "kernels": {role: [asdict(one) for one in found] for role, found in self.kernels.items()},
            "memory": {role: asdict(reading) for role, reading in self.memory.items()},
            "speed": None if self.speed is None else asdict(self.speed),
            "tasks": [asdict(task) for task in self.tasks],
        }


def _engine(info: EngineInfo | None) -> dict[str, Any] | None:
    return None if info is None else {**asdict(info), "kernels": dict(info.kernels)}
