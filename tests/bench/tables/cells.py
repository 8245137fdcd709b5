"""How tables say numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns have text, and whose others have numbers."""
    rules = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join([f"| {' | '.join(head)} |".replace("|  |", "| |"), f"|{'|'.join(rules)}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return ("| " + " | ".join(cells) + " |").replace("|  |", "| |").replace("|  |", "| |")


def spread(numbers: Iterable[float], digits: int = 2) -> str:
    """The lowest and the highest of some numbers, or the one that they are."""
    found = list(numbers)
    low, high = f"{min(found):.{digits}f}", f"{max(found):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def deviation(numbers: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, or the one number."""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def percent(share: float) -> str:
    """A share in per cent, whole ones without a digit behind the point."""
    return f"{100 * share:.1f} %".replace(".0 %", " %")
