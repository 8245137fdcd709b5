"""Divergence: does the candidate still predict what the base predicts, token by token?

Perplexity may stay while the model becomes another one: what it lost in one place it won in another. Judged are the
mean KL divergence from the base's distribution of the next token and the share of positions where the most likely token
is another ("flips"), each over the windows of a text, with the bounds and rules of the quality check.

Source: Dutta et al., "Accuracy is not all you need" (NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparse_serve.gate import wording
from sparse_serve.gate.evidence import Evidence, Limits, TextEvidence
from sparse_serve.gate.statistics import MIN_WINDOWS, mean_bounds
from sparse_serve.gate.verdict import CheckResult, Verdict, bounded


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Judge mean KL divergence and flips of every text against `limits.max_kl` and `limits.max_flips`."""
    wanted = {"kl": limits.max_kl, "flips": limits.max_flips}
    judged = {name: limit for name, limit in wanted.items() if limit is not None}
    tests = len(judged) * len(evidence.texts)
    return [_judge(text, name, limit, limits.alpha, tests) for text in evidence.texts for name, limit in judged.items()]


def _judge(text: TextEvidence, name: str, limit: float, alpha: float, tests: int) -> CheckResult:
    subject = f"{name}, {text.text}"
    problem = next(_problems(text), None)
    if problem:
        return CheckResult("divergence", Verdict.ERROR, problem, {}, subject)
    assert text.divergence is not None
    kl, agreement = text.divergence.kl_per_window, text.divergence.agreement_per_window
    values = np.array(kl) if name == "kl" else 1 - np.array(agreement)
    mean = float(values.mean())
    what = "KL divergence from the base:" if name == "kl" else "another token is the most likely one at"
    if name == "kl" and not text.is_exact:
        what = "KL divergence from the base over the most likely tokens (the true one is no smaller):"
    what += f" {wording.said(name, mean)}"
    if len(values) < MIN_WINDOWS:
        summary = f"{len(values)} windows, at least {MIN_WINDOWS} are needed; {what}"
        return CheckResult("divergence", Verdict.INCONCLUSIVE, summary, {name: mean}, subject)
    low, high = mean_bounds(values, alpha / tests).low, mean_bounds(values, alpha).high
    return CheckResult(
        check="divergence",
        verdict=bounded(low, high, limit),
        summary=f"{what}, {wording.between(name, low, high)} (each bound with {wording.percent(1 - alpha, 0)} "
        f"confidence), {wording.allowed(name, limit)}",
        numbers={name: mean, "lower_bound": low, "upper_bound": high, "limit": limit},
        subject=subject,
    )


def _problems(text: TextEvidence) -> Iterator[str]:
    found = text.divergence
    if found is None:
        yield "the candidate's divergence from the base was not measured"
        return
    windows = len(text.candidate.served.nll_per_window)
    if not len(found.kl_per_window) == len(found.agreement_per_window) == windows or not windows:
        yield f"divergence of {len(found.kl_per_window)} windows; expected {windows}"
        return
    if not np.isfinite([found.kl_per_window, found.agreement_per_window]).all():
        yield "a window's divergence is no finite number"
