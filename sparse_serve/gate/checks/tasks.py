"""Tasks: does the candidate answer as many samples correctly as the base?

Paired, sample by sample: only the samples that one of the two answers correctly say anything. McNemar's test, by its
mid-p value, asks whether the candidate loses more of them than it wins.

    significant, and more than `max_task_drop` lost      fail
    upper bound of the drop within `max_task_drop`       pass
    otherwise                                            inconclusive; give more samples

A task fails at the level `task_alpha` by the number of tasks that can fail: one on which both targets answer alike, up
to a few samples, has no result that would be significant, and does not count (Tarone, Biometrics 46, 1990).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sparse_serve.gate import wording
from sparse_serve.gate.evidence import Evidence, Limits, TaskEvidence
from sparse_serve.gate.statistics import PairedCounts, drop_bound, mcnemar
from sparse_serve.gate.verdict import CheckResult, Verdict


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Judge the drop of accuracy of every task against `limits.max_task_drop`."""
    counted = [_counts(task) for task in evidence.tasks]
    level = _level([counts for counts in counted if counts is not None], limits.task_alpha)
    return [_judge(task, counts, limits, level) for task, counts in zip(evidence.tasks, counted, strict=True)]


def _counts(task: TaskEvidence) -> PairedCounts | None:
    """None where the two were not asked the same samples."""
    if not len(task.base) == len(task.candidate) > 0:
        return None
    pairs = Counter(zip(map(bool, task.base), map(bool, task.candidate), strict=True))
    return PairedCounts(pairs[True, True], pairs[True, False], pairs[False, True], pairs[False, False])


def _level(counted: Sequence[PairedCounts], alpha: float) -> float:
    """The level of one task, so that all together err at `alpha`: Tarone's correction."""
    smallest = [mcnemar(replace(one, only_base=one.discordant, only_candidate=0)) for one in counted]
    tasks = next(k for k in range(1, len(counted) + 2) if sum(p < alpha / k for p in smallest) <= k)
    return alpha / tasks


def _judge(task: TaskEvidence, counts: PairedCounts | None, limits: Limits, level: float) -> CheckResult:
    if counts is None:
        lengths = len(task.base), len(task.candidate)
        problem = f"{lengths[0]} samples of the base and {lengths[1]} of the candidate; expected as many of each"
        return CheckResult("tasks", Verdict.ERROR, problem, {}, task.task)
    p_value, upper = mcnemar(counts), drop_bound(counts, limits.task_alpha)
    if p_value < level and counts.drop > limits.max_task_drop:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.PASS if upper <= limits.max_task_drop else Verdict.INCONCLUSIVE
    base = (counts.both + counts.only_base) / counts.samples
    return CheckResult(
        check="tasks",
        verdict=verdict,
        summary=f"accuracy {wording.percent(base - counts.drop)}, base {wording.percent(base)}, over "
        f"{counts.samples} samples: {counts.only_base} lost and {counts.only_candidate} won "
        f"(McNemar's p {p_value:.2g}): {wording.said('drop', counts.drop)}, at worst {wording.said('drop', upper)}, "
        f"{wording.allowed('drop', limits.max_task_drop)}",
        numbers={
            "base_accuracy": base,
            "candidate_accuracy": base - counts.drop,
            "only_base": float(counts.only_base),
            "only_candidate": float(counts.only_candidate),
            "p_value": p_value,
            "drop": counts.drop,
            "upper_bound": upper,
            "limit": limits.max_task_drop,
        },
        subject=task.task,
    )
