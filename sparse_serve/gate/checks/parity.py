"""Parity: does the server compute what the offline model computes?

The same weights, the same token windows, two stacks: vLLM with our kernels and transformers with the unpacked weights.
A difference beyond rounding is a loading or kernel bug, and would make every other number of the gate meaningless. The
dense model is compared too, so that a difference can be blamed on the engine or on the sparse path.
"""

from __future__ import annotations

from sparse_serve.gate.report import CheckResult, Evidence, Limits, Measured, Verdict


def run(evidence: Evidence, limits: Limits) -> CheckResult:
    """Fail when served and offline perplexity differ by more than `limits.parity_tolerance`, relatively."""
    dense, sparse = _difference(evidence.dense), _difference(evidence.sparse)
    worst = max(dense, sparse)
    return CheckResult(
        check="parity",
        verdict=Verdict.PASS if worst <= limits.parity_tolerance else Verdict.FAIL,
        summary=f"served and offline perplexity differ by {sparse:.4%} (sparse) and {dense:.4%} (dense), "
        f"allowed {limits.parity_tolerance:.2%}",
        numbers={"dense_relative_difference": dense, "sparse_relative_difference": sparse},
    )


def _difference(measured: Measured) -> float:
    return abs(measured.served.value / measured.offline.value - 1.0)
