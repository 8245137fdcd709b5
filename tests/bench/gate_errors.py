"""How often the gate is wrong: simulated runs in which the truth is known, for the table of docs/gate.md.

    python -m tests.bench.gate_errors --runs 1000 --save

The cases are those of tests/sparse_serve/gate/test_planted.py, which holds the gate to its promises at 200 runs each.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable

from sparse_serve.gate.checks import tasks
from sparse_serve.gate.evidence import Evidence, Limits, TaskEvidence
from sparse_serve.gate.verdict import Verdict, worst
from tests.bench import record
from tests.sparse_serve.gate.test_planted import dropped, quality_run, speed_run, task_run

Run = Callable[[int], Verdict]
"""From a seed to the verdict of a simulated run."""


def beside(lost: float, won: float, others: tuple[TaskEvidence, ...]) -> Run:
    """A task that changes, beside others."""
    return lambda seed: worst(tasks.run(Evidence(tasks=[*others, dropped(lost, won, seed)]), Limits()))


def cases() -> dict[str, Run]:
    """The runs to simulate, by what is true in them."""
    same = TaskEvidence("same", [True] * 900 + [False] * 100, [True] * 900 + [False] * 100)
    two = math.log1p(0.02)
    found: dict[str, Run] = {
        "perplexity: the same model, limit 1 %": quality_run(0.0, 0.01),
        "perplexity: the same model, limit 5 %": quality_run(0.0, 0.05),
        "perplexity: +2 %, limit 1 %": quality_run(two, 0.01),
        "perplexity: +1 %, limit 1 %, one text": quality_run(math.log1p(0.01), 0.01, texts=1),
        "tasks: the same model": task_run(0.0, 0.0),
        "tasks: 6 % lost, 3 % won, beside two that stay": beside(0.06, 0.03, (same, same)),
    }
    shares = ((0.002, 0.002), (0.04, 0.01), (0.05, 0.02), (0.06, 0.03), (0.08, 0.05), (0.01, 0.01), (0.03, 0.03))
    found |= {f"tasks: {lost:.1%} lost, {won:.1%} won": task_run(lost, won) for lost, won in shares}
    found |= {
        f"speed: {slowdown:+.0%}, noise of {noise:.0%}, limit {limit:.0%}": speed_run(
            slowdown, noise, max_slowdown=limit
        )
        for slowdown, noise, limit in (
            (0.05, 0.15, 0.03),
            (0.05, 0.15, 0.05),
            (0.05, 0.02, 0.03),
            (0.0, 0.15, 0.03),
            (0.0, 0.02, 0.03),
        )
    }
    return found


def main() -> None:
    """Simulate, print a row for each case, write all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--save", action="store_true", help="keep the rows under tests/bench/results")
    args = parser.parse_args()
    rows = []
    for name, run in cases().items():
        counts = Counter(run(seed) for seed in range(args.runs))
        shares = {verdict.value: counts[verdict] / args.runs for verdict in (Verdict.FAIL, Verdict.PASS)}
        shares["inconclusive"] = counts[Verdict.INCONCLUSIVE] / args.runs
        rows.append({"truth": name, **shares})
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares.values())} |", flush=True)  # noqa: T201
    if args.save:
        print(record.save("gate-errors", "simulated", {"runs": args.runs, "rows": rows}))  # noqa: T201


if __name__ == "__main__":
    main()
