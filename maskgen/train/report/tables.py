"""Tables of shaded cells for a report: agreement by layer, and which patterns the groups follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from maskgen.train.report.runs import LayerMasks, Run, place

MOST_HEAT_PERCENT = 65
"""Of the heat colour in a cell: the page's ink can still be read on it, in both themes."""

MOST_CELLS = 20_000
"""Of one table. A larger one could not be looked at, and a log that means harm could ask for any size."""

MOST_NUMBERED = 24
"""Columns with room for numbers; with more of them the numbers are in the cells' titles only."""

MOST_PATTERNS = 16
"""Patterns that get a column each; where there are more, the columns of a group get one."""

_SCALES = (0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.5, 0.0)


@dataclass(frozen=True)
class Cell:
    """`percent` is the share of the heat colour."""

    text: str
    title: str
    percent: float


@dataclass(frozen=True)
class Row:
    """One line of a `Table`; None is an empty cell."""

    name: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Table:
    """A table of shaded cells."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]

    @property
    def narrow(self) -> bool:
        """Whether there is no room for numbers."""
        return len(self.columns) > MOST_NUMBERED


def least_agreement(runs: Iterable[Run]) -> float:
    """Where the colour scale of all runs begins: a round number that no layer is below."""
    least = min((masks.agreement for run in runs for masks in run.layers.values()), default=1.0)
    return next(scale for scale in _SCALES if scale <= least)


def agreement(run: Run, least: float) -> Table | None:
    """Kinds of layers by blocks of the model; None if the log has no layers, or too many."""
    places = {name: place(name) for name in run.layers}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values() if block is not None})
    columns: list[int | None] = [*blocks, *([None] if None in {block for _, block in places.values()} else [])]
    if not kinds or len(kinds) * len(columns) > MOST_CELLS:
        return None
    cells = {
        places[name]: Cell(
            f"{100 * masks.agreement:.1f}",
            f"{name}: {masks.agreement:.2%}",
            round(MOST_HEAT_PERCENT * (1 - masks.agreement) / (1 - least), 1),
        )
        for name, masks in run.layers.items()
    }
    rows = [
        Row(short, [cells.get((kind, c)) for c in columns]) for kind, short in zip(kinds, _short(kinds), strict=True)
    ]
    headings = ["other" if column is None else str(column) for column in columns]
    return Table("Kind of layer (rows) by block (columns)", headings, rows)


def _short(kinds: Sequence[str]) -> list[str]:
    """`model.layers.*.mlp.up_proj` as `mlp.up_proj`, where nothing is lost by it."""
    prefixes = {kind.partition("*")[0] for kind in kinds if "*" in kind}
    if len(prefixes) > 1:
        return list(kinds)
    return [kind.partition("*.")[2] or kind for kind in kinds]


def pattern_totals(runs: Sequence[tuple[str, Run]]) -> list[Table]:
    """All layers together, run by run; one table for each size of group. `runs` have a name each."""
    totals = {name: _total(run.layers.values()) for name, run in runs}
    tables = []
    for m in sorted({_group(counts) for counts in totals.values() if counts}):
        mine = {name: counts for name, counts in totals.items() if counts and _group(counts) == m}
        tables.append(_pattern_table(f"All layers, groups of {m}", mine))
    return tables


def patterns_by_kind(run: Run) -> Table | None:
    """Kinds of layers, all blocks together; None if the log has no patterns."""
    kinds = list(dict.fromkeys(place(name)[0] for name in run.layers))
    labels = dict(zip(kinds, _short(kinds), strict=True))
    return _grouped("Kinds of layers, all blocks together", run.layers, lambda name: labels[place(name)[0]])


def patterns_by_layer(run: Run) -> Table | None:
    """Every layer; None if the log has no patterns."""
    return _grouped("Every layer", run.layers, lambda name: name)


def _grouped(caption: str, layers: Mapping[str, LayerMasks], label: Callable[[str], str]) -> Table | None:
    members: dict[Hashable, list[LayerMasks]] = {}
    for name, masks in layers.items():
        members.setdefault(label(name), []).append(masks)
    counts = {str(name): _total(masks) for name, masks in members.items()}
    counts = {name: count for name, count in counts.items() if count}
    if not counts or len(counts) * MOST_PATTERNS > MOST_CELLS:
        return None
    return _pattern_table(caption, counts)


def _total(layers: Iterable[LayerMasks]) -> Counter[str]:
    total: Counter[str] = Counter()
    for masks in layers:
        total.update(masks.patterns)
    return +total


def _group(counts: Mapping[str, int]) -> int:
    """Columns of a group; the log's reader has checked that all patterns of a run are as long."""
    return len(next(iter(counts)))


def _pattern_table(caption: str, counts: Mapping[str, Counter[str]]) -> Table:
    """One row for each of `counts`: shares of the patterns, or of the columns kept where patterns are many."""
    patterns = sorted(set().union(*counts.values()), reverse=True)
    if len(patterns) <= MOST_PATTERNS:
        rows = [_row(name, [count[pattern] for pattern in patterns], count.total()) for name, count in counts.items()]
        return Table(f"{caption}: % of groups that follow each pattern", patterns, rows)
    columns = range(len(patterns[0]))
    rows = [
        _row(name, [sum(n for kept, n in count.items() if kept[c] == "1") for c in columns], count.total())
        for name, count in counts.items()
    ]
    used = f"{len(patterns)} patterns occur"
    return Table(f"{caption}: % of groups that keep each column; {used}", [f"column {c}" for c in columns], rows)


def _row(name: str, counts: Sequence[int], groups: int) -> Row:
    """What is chosen more often than the row's mean is shaded; all of the heat stands for twice the mean."""
    mean = sum(counts) / len(counts) or 1.0
    cells = [
        Cell(
            f"{100 * count / groups:.1f}",
            f"{name}: {count:,} of {groups:,} groups",
            round(MOST_HEAT_PERCENT * min(1.0, max(0.0, count / mean - 1)), 1),
        )
        for count in counts
    ]
    return Row(name, cells)
