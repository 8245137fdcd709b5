"""Tasks: does the candidate answer as many samples correctly as the base?

Paired, sample by sample: only the samples that one of the two answers correctly say anything. McNemar's exact test asks
whether the candidate loses more of them than it wins.

    significant, and more than `max_task_drop` lost      fail
    upper bound of the drop within `max_task_drop`       pass
    otherwise                                            inconclusive; give more samples

A task fails at the level `task_alpha` by the number of tasks.
"""

from __future__ import annotations

from collections import Counter

from sparse_serve.gate.evidence import Evidence, Limits, TaskEvidence
from sparse_serve.gate.statistics import PairedCounts, drop_bound, mcnemar
from sparse_serve.gate.verdict import CheckResult, Verdict


def run(evidence: Evidence, limits: Limits) -> list[CheckResult]:
    """Judge the drop of accuracy of every task against `limits.max_task_drop`."""
    return [_judge(task, limits, len(evidence.tasks)) for task in evidence.tasks]


def _judge(task: TaskEvidence, limits: Limits, tasks: int) -> CheckResult:
    lengths = len(task.base), len(task.candidate)
    if not min(lengths) or lengths[0] != lengths[1]:
        problem = f"{lengths[0]} samples of the base and {lengths[1]} of the candidate; expected as many of each"
        return CheckResult("tasks", Verdict.ERROR, problem, {}, task.task)
    pairs = Counter(zip(map(bool, task.base), map(bool, task.candidate), strict=True))
    counts = PairedCounts(pairs[True, True], pairs[True, False], pairs[False, True], pairs[False, False])
    p_value, upper = mcnemar(counts), drop_bound(counts, limits.alpha)
    if p_value < limits.task_alpha / tasks and counts.drop > limits.max_task_drop:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.PASS if upper <= limits.max_task_drop else Verdict.INCONCLUSIVE
    base = (counts.both + counts.only_base) / counts.samples
    return CheckResult(
        check="tasks",
        verdict=verdict,
        summary=f"accuracy {base - counts.drop:.2%}, base {base:.2%}, over {counts.samples} samples: "
        f"{counts.only_base} lost and {counts.only_candidate} won (McNemar's p {p_value:.4f}); the drop is "
        f"{counts.drop:+.2%}, at most {upper:+.2%}, allowed {limits.max_task_drop:.2%}",
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
