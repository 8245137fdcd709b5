"""Parity: does the server compute what the offline model computes?

The same weights, the same token windows, two stacks: vLLM with our kernels and transformers with the unpacked weights.
A difference beyond rounding is a loading or kernel bug, and would make every other number of the gate meaningless. The
base is compared too, so that a difference can be blamed on the engine or on the sparse path.
"""

from __future__ import annotations

import math

from sparse_serve.gate.evidence import Evidence, Limits, Scores, TextEvidence
from sparse_serve.gate.verdict import CheckResult, Verdict
from sparse_serve.gate.wording import percent


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Fail when served and offline perplexity differ by more than `limits.parity_tolerance`, relatively.

    A target that was not measured offline (a URL) is left out.
    """
    return [result for text in evidence.texts if (result := _judge(text, limits)) is not None]


def _judge(text: TextEvidence, limits: Limits) -> CheckResult | None:
    targets = {"candidate": text.candidate, "base": text.base}
    found = {name: _difference(scores) for name, scores in targets.items() if scores.offline is not None}
    if not found:
        return None
    if not all(map(math.isfinite, found.values())):
        return CheckResult("parity", Verdict.ERROR, "a perplexity is no finite number", {}, text.text)
    differences = " and ".join(f"{percent(difference, 4)} ({name})" for name, difference in found.items())
    return CheckResult(
        check="parity",
        verdict=Verdict.PASS if max(found.values()) <= limits.parity_tolerance else Verdict.FAIL,
        summary=f"served and offline perplexity differ by {differences}, allowed {percent(limits.parity_tolerance)}",
        numbers={f"{name}_relative_difference": difference for name, difference in found.items()},
        subject=text.text,
    )


def _difference(scores: Scores) -> float:
    assert scores.offline is not None
    return abs(scores.served.value / scores.offline.value - 1.0)
