"""What the gate measured and decided, as data, as JSON and as Markdown.

    evidence   the raw numbers: mean negative log-likelihood of every window, four times over
    result     one check's verdict with the numbers it rests on
    report     everything together; its verdict is the worst of its results

Verdicts, from best to worst, and the exit code of the command:

    pass          0    within the limits, with confidence
    inconclusive  4    the data cannot tell; measure more windows
    fail          1    a regression, with confidence
    error         3    could not measure
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from maskgen.core.files import fsync_path, temporary_sibling
from maskgen.core.perplexity import Perplexity
from sparse_serve.engine import EngineInfo

SCHEMA_VERSION = 1


class Verdict(Enum):
    """Outcome of a check or of the whole gate."""

    PASS = "pass"
    INCONCLUSIVE = "inconclusive"
    FAIL = "fail"
    ERROR = "error"

    @property
    def exit_code(self) -> int:
        """Exit status of `sparse-serve gate`; 2 is left to usage errors."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.ERROR: 3, Verdict.INCONCLUSIVE: 4}[self]


@dataclass(frozen=True)
class Limits:
    """What is allowed. Fractions, not percent: `max_ppl_increase=0.05` allows 5 %.

    `parity_tolerance` bounds the relative difference between served and offline perplexity of the same weights;
    `alpha` is the significance level of the quality check, a one-sided test.
    """

    max_ppl_increase: float = 0.05
    parity_tolerance: float = 0.001
    alpha: float = 0.05


@dataclass(frozen=True)
class Measured:
    """One model: perplexity offline (transformers) and served (vLLM) on the same windows, and what was served."""

    offline: Perplexity
    served: Perplexity
    engine: EngineInfo


@dataclass(frozen=True)
class Evidence:
    """Both models, and the smallest resident fraction the sparse one's pattern and dtype allow."""

    dense: Measured
    sparse: Measured
    packed_fraction: float


@dataclass(frozen=True)
class CheckResult:
    """A verdict in one sentence, with the numbers behind it."""

    check: str
    verdict: Verdict
    summary: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class GateReport:
    """Everything a release pipeline keeps. `provenance` holds digests, versions and hardware."""

    results: Sequence[CheckResult]
    evidence: Evidence
    limits: Limits
    provenance: Mapping[str, Any]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all checks."""
        order = list(Verdict)
        return max((result.verdict for result in self.results), key=order.index)

    def write(self, folder: str | Path) -> list[Path]:
        """Write `report.json` and `report.md` into `folder`, which is made if needed; returns their paths."""
        paths = self.files(folder)
        for path, text in zip(paths, (self.to_json(), self.to_markdown()), strict=True):
            with temporary_sibling(path) as temporary:
                temporary.write_text(text, "utf-8")
                fsync_path(temporary)
        return paths

    @staticmethod
    def files(folder: str | Path) -> list[Path]:
        """The paths that `write` writes in `folder`."""
        return [Path(folder) / "report.json", Path(folder) / "report.md"]

    def to_json(self) -> str:
        """All of it, raw samples included."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict.value,
            "results": [{**asdict(result), "verdict": result.verdict.value} for result in self.results],
            "limits": asdict(self.limits),
            "provenance": dict(self.provenance),
            "evidence": {
                name: {
                    "offline": measured.offline.to_dict(),
                    "served": measured.served.to_dict(),
                    "engine": {**asdict(measured.engine), "kernels": dict(measured.engine.kernels)},
                }
                for name, measured in (("dense", self.evidence.dense), ("sparse", self.evidence.sparse))
            },
        }
        return json.dumps(value, indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """A page for people: verdict, checks, perplexities, provenance."""
        dense, sparse = self.evidence.dense, self.evidence.sparse
        lines = [
            f"# Gate: {self.verdict.value.upper()}",
            "",
            "| check | verdict | finding |",
            "|---|---|---|",
            *(f"| {result.check} | {result.verdict.value} | {result.summary} |" for result in self.results),
            "",
            "| perplexity | offline (transformers) | served (vLLM) |",
            "|---|---:|---:|",
            f"| dense | {dense.offline.value:.4f} | {dense.served.value:.4f} |",
            f"| sparse | {sparse.offline.value:.4f} | {sparse.served.value:.4f} |",
            f"| increase | {sparse.offline.value / dense.offline.value - 1:+.2%} "
            f"| {sparse.served.value / dense.served.value - 1:+.2%} |",
            "",
            f"Protocol: {dense.served.protocol.describe()}; {len(dense.served.nll_per_window)} windows, "
            f"{sum(dense.served.scored_tokens_per_window)} scored tokens, dtype {sparse.engine.dtype}.",
            "",
            *(f"- {key}: `{value}`" for key, value in self.provenance.items()),
        ]
        return "\n".join(lines) + "\n"
