"""Quality: is the candidate's perplexity within the allowed increase, with confidence, on every text?

Non-inferiority on paired windows. Each window's mean negative log-likelihood is taken from both served models and
subtracted, which removes the variance between windows (far larger than the effect). A block bootstrap over the
differences (`statistics.mean_bounds`) gives one-sided bounds; `exp` of a bound is the ratio of perplexities it stands
for.

    upper bound <= allowed   pass            even the pessimistic reading is within the limit
    lower bound >  allowed   fail            even the optimistic reading is beyond it
    otherwise                inconclusive    the windows cannot tell; give more text

The worst text decides. A text fails at the level `alpha` by the number of texts, so that many texts do not add up to a
chance of failing; all of them have to pass at `alpha`, which needs no such correction.
"""

from __future__ import annotations

import math

import numpy as np

from sparse_serve.gate import wording
from sparse_serve.gate.evidence import Evidence, Limits, TextEvidence
from sparse_serve.gate.statistics import MIN_WINDOWS, mean_bounds
from sparse_serve.gate.verdict import CheckResult, Verdict, bounded


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Judge `exp(mean difference) - 1` of every text against `limits.max_ppl_increase`."""
    return [_judge(text, limits, len(evidence.texts)) for text in evidence.texts]


def _judge(text: TextEvidence, limits: Limits, texts: int) -> CheckResult:
    base, candidate = text.base.served, text.candidate.served
    problem = _problem(text)
    if problem:
        return CheckResult("quality", Verdict.ERROR, problem, {}, text.text)
    differences = np.subtract(candidate.nll_per_window, base.nll_per_window)
    increase = math.expm1(differences.mean())
    found = f"perplexity {candidate.value:.4g}, base {base.value:.4g}: {wording.said('ppl_increase', increase)}"
    if len(differences) < MIN_WINDOWS:
        return CheckResult(
            "quality",
            Verdict.INCONCLUSIVE,
            f"{len(differences)} windows, at least {MIN_WINDOWS} are needed; {found}",
            {"ppl_increase": increase},
            text.text,
        )
    lower = math.expm1(mean_bounds(differences, limits.alpha / texts).low)
    upper = math.expm1(mean_bounds(differences, limits.alpha).high)
    return CheckResult(
        check="quality",
        verdict=bounded(lower, upper, limits.max_ppl_increase),
        summary=f"{found}, {wording.between('ppl_increase', lower, upper)} (each bound with "
        f"{wording.percent(1 - limits.alpha, 0)} confidence), "
        f"{wording.allowed('ppl_increase', limits.max_ppl_increase)}",
        numbers={
            "ppl_increase": increase,
            "lower_bound": lower,
            "upper_bound": upper,
            "limit": limits.max_ppl_increase,
        },
        subject=text.text,
    )


def _problem(text: TextEvidence) -> str | None:
    base, candidate = text.base.served, text.candidate.served
    if base.tokens_digest != candidate.tokens_digest:
        return "the two models were not scored on the same tokens; perplexities per token cannot be compared"
    lengths = len(base.nll_per_window), len(candidate.nll_per_window)
    if not min(lengths) or lengths[0] != lengths[1]:
        return f"{lengths[0]} windows of the base and {lengths[1]} of the candidate; expected as many of each"
    if not np.isfinite([base.nll_per_window, candidate.nll_per_window]).all():
        return "a window's log-likelihood is no finite number"
    return None
