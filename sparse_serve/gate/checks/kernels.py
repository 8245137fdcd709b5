"""Kernels: does each kernel that serves a sparse layer compute that layer's product, up to rounding?

Perplexity averages over a model; a single wrong tile may hide in it. So while a directory's sparse layers were loaded,
each was run with its own tensors on random inputs, at both ends of every bucket of tokens, against the product of the
stored form in float64. What rounding can explain follows from the dtype and from the number of products in a sum
(`tuning.parity`); a difference beyond it is a bug, and the worst is named: layer, kernel, tokens, outputs and inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_serve.gate.evidence import TARGETS, Evidence, Limits
from sparse_serve.gate.verdict import CheckResult, Verdict
from sparse_serve.gate.wording import percent
from sparse_serve.tuning.parity_file import KernelParity


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Judge every kernel of every target with sparse layers that the gate served itself."""
    results = []
    for role in TARGETS:
        found = evidence.kernels.get(role)
        if found is None:
            continue
        if problem := _problem(role, found, evidence):
            results.append(CheckResult("kernels", Verdict.ERROR, problem, {}, role))
        for kernel in sorted({one.kernel for one in found}):
            results.append(_judge(role, kernel, [one for one in found if one.kernel == kernel]))
    return results


def _problem(role: str, found: Sequence[KernelParity], evidence: Evidence) -> str | None:
    engine = evidence.base_engine if role == "base" else evidence.candidate_engine
    layers = len({one.layer for one in found})
    expected = 1 if engine is None else engine.sparse_layers
    if layers < max(expected, 1):
        return f"{layers} layers were compared; expected at least {expected}"
    compared = {(one.layer, one.rank) for one in found}
    missing = ((one.layer, rank) for one in found for rank in range(one.ranks) if (one.layer, rank) not in compared)
    return next((f"{layer} was not compared on rank {rank}" for layer, rank in missing), None)


def _judge(role: str, kernel: str, found: Sequence[KernelParity]) -> CheckResult:
    worst = max(found, key=lambda one: one.ratio)
    wrong = {one.layer for one in found if not one.ratio <= 1}
    layers = len({one.layer for one in found})
    if wrong:
        where = ", ".join(
            f"{name} {first} to {last}"
            for name, span in (("outputs", worst.rows), ("inputs", worst.columns))
            if span is not None
            for first, last in (span,)
        )
        summary = (
            f"{len(wrong)} of {layers} layers are wrong, worst {worst.place} with {worst.bucket} at {where}: off by "
            f"{worst.error:.3g}, where rounding explains {worst.allowed:.3g}"
        )
    else:
        summary = (
            f"{layers} layers are right: the largest difference is {percent(worst.ratio, 0)} of what rounding "
            f"explains, in {worst.place} with {worst.bucket}"
        )
    return CheckResult(
        check="kernels",
        verdict=Verdict.FAIL if wrong else Verdict.PASS,
        summary=summary,
        numbers={
            "layers": float(layers),
            "wrong_layers": float(len(wrong)),
            "worst_error": worst.error,
            "worst_allowed": worst.allowed,
            "worst_ratio": worst.ratio,
        },
        subject=f"{kernel}, {role}",
    )
