"""Confidence bounds that the checks share: of a mean over windows of text, of a ratio over rounds, of a paired task.

All bounds are one-sided at a level `alpha`: the true value lies above `high` with probability `alpha`, and below `low`
with probability `alpha`. Resampling is seeded, so the same samples give the same bounds.

    mean_bounds    BCa bootstrap over blocks of neighbouring windows, as neighbours share a subject
    ratio_bounds   of log ratios of rounds: the wider of Student's t and BCa, as there are few rounds and long tails
    welch_bounds   of the same for two reports, whose rounds are not paired
    McNemar        by its mid-p value, on the samples that only one of two models answers correctly

Sources: B. Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987), as `scipy.stats.bootstrap` has it;
Q. McNemar, Psychometrika 12 (1947); M. Fagerland, S. Lydersen, P. Laake, "The McNemar test for binary matched-pairs
data: mid-p and asymptotic are better than exact conditional", BMC Medical Research Methodology 13 (2013).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_WINDOWS = 8
"""Below this a bootstrap has too few distinct resamples to be trusted."""

_RESAMPLES = 5_000
_ROUND_RESAMPLES = 2_000
_MIN_BLOCKS = 20
_NO_SPREAD = 1e-9
"""Values that vary by less than this vary by rounding only; a bootstrap of them divides by zero."""


@dataclass(frozen=True)
class Bounds:
    """An estimate between its one-sided bounds."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedCounts:
    """Samples of a task by who answers correctly: both, only the base, only the candidate, neither."""

    both: int
    only_base: int
    only_candidate: int
    neither: int

    @property
    def samples(self) -> int:
        """All of them."""
        return self.both + self.only_base + self.only_candidate + self.neither

    @property
    def discordant(self) -> int:
        """Those that one of the two answers correctly."""
        return self.only_base + self.only_candidate

    @property
    def drop(self) -> float:
        """Accuracy of the base less accuracy of the candidate: positive if the candidate is worse."""
        return (self.only_base - self.only_candidate) / self.samples


def mean_bounds(values: Sequence[float] | np.ndarray, alpha: float, seed: int = 0) -> Bounds:
    """Bounds of the mean of `values`, one number per window, in the order of the text.

    Neighbours form blocks of at most the cube root of their number, as long as there are 20 blocks.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if np.ptp(array) < _NO_SPREAD:  # nothing to resample: the same model twice, or shifted exactly
        return Bounds(mean, mean, mean)
    blocks = np.array_split(array, len(array) // _block(len(array)))
    sums, counts = np.array([block.sum() for block in blocks]), np.array([float(len(block)) for block in blocks])
    if np.ptp(sums / counts) < _NO_SPREAD:
        return Bounds(mean, mean, mean)

    def mean_of(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(sums.sum(axis=axis) / counts.sum(axis=axis))

    interval = stats.bootstrap(
        (sums, counts),
        mean_of,
        paired=True,
        vectorized=True,
        confidence_level=1 - 2 * alpha,
        n_resamples=_RESAMPLES,
        batch=1_000,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Bounds(mean, float(interval.low), float(interval.high))


def ratio_bounds(ratios: Sequence[float] | np.ndarray, low_alpha: float, high_alpha: float, seed: int = 0) -> Bounds:
    """Bounds of the geometric mean of `ratios`, one per round; each side has a level of its own. Needs two rounds."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    mean, rounds = float(logs.mean()), len(logs)
    error = float(logs.std(ddof=1)) / math.sqrt(rounds)
    if error < _NO_SPREAD:
        return Bounds(math.exp(mean), math.exp(mean), math.exp(mean))
    low = mean - float(stats.t.ppf(1 - low_alpha, rounds - 1)) * error
    high = mean + float(stats.t.ppf(1 - high_alpha, rounds - 1)) * error
    return Bounds(
        math.exp(mean),
        math.exp(min(low, _bca(logs, low_alpha, seed)[0])),
        math.exp(max(high, _bca(logs, high_alpha, seed)[1])),
    )


def welch_bounds(earlier: Sequence[float], later: Sequence[float], low_alpha: float, high_alpha: float) -> Bounds:
    """Bounds of the ratio of geometric means, `later` to `earlier`, of two independent samples, each with a spread of
    its own (Welch). Each needs two values."""
    before, after = np.log(np.asarray(earlier)), np.log(np.asarray(later))
    mean = float(after.mean() - before.mean())
    if max(np.ptp(before), np.ptp(after)) < _NO_SPREAD:
        return Bounds(math.exp(mean), math.exp(mean), math.exp(mean))
    test = stats.ttest_ind(after, before, equal_var=False)
    low = float(test.confidence_interval(1 - 2 * low_alpha).low)
    high = float(test.confidence_interval(1 - 2 * high_alpha).high)
    return Bounds(math.exp(mean), math.exp(low), math.exp(high))


def _bca(values: np.ndarray, alpha: float, seed: int) -> tuple[float, float]:
    """One-sided BCa bounds of the mean; infinities that leave Student's bounds alone where BCa has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=1 - 2 * alpha,
            n_resamples=_ROUND_RESAMPLES,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return (low if math.isfinite(low) else math.inf, high if math.isfinite(high) else -math.inf)


def mcnemar(counts: PairedCounts) -> float:
    """One-sided mid-p value of "the candidate is no worse", on the samples that only one of the two answers correctly.

    Half of the chance of just what was seen counts, where the exact test counts all of it and so errs more rarely than
    its level says, at the price of power.
    """
    if counts.discordant == 0:
        return 1.0
    seen = stats.binom(counts.discordant, 0.5)
    return float(seen.sf(counts.only_base) + 0.5 * seen.pmf(counts.only_base))


def drop_bound(counts: PairedCounts, alpha: float) -> float:
    """One-sided upper bound of `counts.drop`, by Agresti and Min's adjusted Wald interval for matched pairs."""
    worse, better, samples = counts.only_base + 0.5, counts.only_candidate + 0.5, counts.samples + 2.0
    drop = (worse - better) / samples
    error = math.sqrt(worse + better - (worse - better) ** 2 / samples) / samples
    return drop + float(stats.norm.ppf(1 - alpha)) * error


def _block(windows: int) -> int:
    """Length of a block of windows."""
    return max(1, min(math.floor(windows ** (1 / 3) + 1e-9), windows // _MIN_BLOCKS))
