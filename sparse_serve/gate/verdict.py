"""Verdicts, from best to worst, and the exit status of the command:

pass          0    within the limits, with confidence
inconclusive  4    the data cannot tell; measure more
fail          1    a regression, with confidence
error         3    could not measure
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


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
class CheckResult:
    """A verdict in one sentence, with the numbers behind it.

    `subject` is what was judged where a check judges several things: a text, a metric under a load, a task.
    """

    check: str
    verdict: Verdict
    summary: str
    numbers: Mapping[str, float]
    subject: str = ""

    @property
    def name(self) -> str:
        """For people: the check, and what it judged."""
        return f"{self.check} ({self.subject})" if self.subject else self.check

    @staticmethod
    def of(stored: Mapping[str, Any]) -> CheckResult:
        """From `to_dict`; a number that was none is NaN again."""
        numbers = {name: math.nan if value is None else value for name, value in stored["numbers"].items()}
        return CheckResult(stored["check"], Verdict(stored["verdict"]), stored["summary"], numbers, stored["subject"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {**asdict(self), "numbers": dict(self.numbers), "verdict": self.verdict.value}


def worst(results: Iterable[CheckResult]) -> Verdict:
    """The worst verdict; nothing judged is an error, never a pass."""
    order = list(Verdict)
    return max((result.verdict for result in results), key=order.index, default=Verdict.ERROR)


_ORDER = (
    "measurement",
    "environment",
    "coverage",
    "quality",
    "tasks",
    "speed",
    "divergence",
    "parity",
    "kernels",
    "memory",
)


def worst_first(results: Iterable[CheckResult]) -> list[CheckResult]:
    """Results in the order in which they matter: by verdict, then what readers ask for before what explains it."""
    order = list(Verdict)
    known = {check: at for at, check in enumerate(_ORDER)}
    return sorted(results, key=lambda one: (-order.index(one.verdict), known.get(one.check, len(known))))


def bounded(low: float, high: float, limit: float) -> Verdict:
    """Non-inferiority: where a quantity of which less is better lies, with one-sided bounds, against its limit."""
    if high <= limit:
        return Verdict.PASS
    return Verdict.FAIL if low > limit else Verdict.INCONCLUSIVE
