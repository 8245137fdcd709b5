"""Quality: is the sparse model's perplexity within the allowed increase, with confidence?

Non-inferiority on paired windows. Each window's mean negative log-likelihood is taken from both served models and
subtracted, which removes the variance between windows (far larger than the effect). A BCa bootstrap over the
differences gives one-sided bounds at level `alpha`; `exp` of a bound is the ratio of perplexities it stands for.

    upper bound <= allowed   pass            even the pessimistic reading is within the limit
    lower bound >  allowed   fail            even the optimistic reading is beyond it
    otherwise                inconclusive    the windows cannot tell; give more text

Source: B. Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987), as implemented by `scipy.stats.bootstrap`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import bootstrap

from sparse_serve.gate.report import CheckResult, Evidence, Limits, Verdict

RESAMPLES = 10_000
MIN_WINDOWS = 8
"""Below this a bootstrap has too few distinct resamples to be trusted."""

NO_SPREAD_NATS = 1e-9
"""Differences that vary by less than this vary by rounding only; a bootstrap of them divides by zero."""


def run(evidence: Evidence, limits: Limits) -> CheckResult:
    """Judge `exp(mean difference) - 1` against `limits.max_ppl_increase` at level `limits.alpha`."""
    dense, sparse = evidence.dense.served, evidence.sparse.served
    differences = np.subtract(sparse.nll_per_window, dense.nll_per_window)
    increase = math.expm1(differences.mean())
    if len(differences) < MIN_WINDOWS:
        return CheckResult(
            "quality",
            Verdict.INCONCLUSIVE,
            f"{len(differences)} windows, at least {MIN_WINDOWS} are needed; perplexity changed by {increase:+.2%}",
            {"ppl_increase": increase},
        )
    lower, upper = (math.expm1(bound) for bound in _bounds(differences, limits.alpha))
    if upper <= limits.max_ppl_increase:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.FAIL if lower > limits.max_ppl_increase else Verdict.INCONCLUSIVE
    return CheckResult(
        check="quality",
        verdict=verdict,
        summary=f"perplexity {increase:+.2%}, between {lower:+.2%} and {upper:+.2%} "
        f"(one-sided {1 - limits.alpha:.0%} bounds), allowed {limits.max_ppl_increase:+.2%}",
        numbers={"ppl_increase": increase, "lower_bound": lower, "upper_bound": upper},
    )


def _bounds(differences: np.ndarray, alpha: float) -> tuple[float, float]:
    if np.ptp(differences) < NO_SPREAD_NATS:  # nothing to resample: the same model twice, or shifted exactly
        return float(differences[0]), float(differences[0])
    interval = bootstrap(
        (differences,),
        np.mean,
        confidence_level=1 - 2 * alpha,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
