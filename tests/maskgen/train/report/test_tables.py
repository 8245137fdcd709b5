"""The shaded tables: every layer in its place, shares that add up, sizes that are bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskgen.core.pattern import NMPattern
from maskgen.train.report.runs import Run, load
from maskgen.train.report.tables import (
    MOST_HEAT_PERCENT,
    agreement,
    least_agreement,
    pattern_totals,
    patterns_by_kind,
    patterns_by_layer,
)
from tests.maskgen import logs


def run_of(tmp_path: Path, masks: dict[str, Any]) -> Run:
    return load(logs.write(tmp_path / "log", [logs.layers(masks)]))


def masks_of(agreement: float = 1.0, **patterns: int) -> dict[str, Any]:
    return {"agreement": agreement, "patterns": {kept.removeprefix("p"): count for kept, count in patterns.items()}}


def test_every_layer_has_its_cell(tmp_path: Path) -> None:
    names = {"m.layers.10.q": 0.9, "m.layers.2.q": 0.8, "m.layers.2.mlp.up": 1.0, "head": 0.95}
    run = run_of(tmp_path, {name: masks_of(value) for name, value in names.items()})
    table = agreement(run, 0.8)
    assert table is not None and list(table.columns) == ["2", "10", "other"]
    shown = {row.name: [cell and cell.text for cell in row.cells] for row in table.rows}
    assert shown == {"q": ["80.0", "90.0", None], "mlp.up": ["100.0", None, None], "head": [None, None, "95.0"]}
    heat = {cell.title: cell.percent for row in table.rows for cell in row.cells if cell}
    assert heat["m.layers.2.q: 80.00%"] == MOST_HEAT_PERCENT and heat["m.layers.2.mlp.up: 100.00%"] == 0


def test_layers_of_two_stacks_are_kept_apart(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"encoder.0.q": masks_of(0.5), "decoder.0.q": masks_of(0.6)})
    table = agreement(run, 0.5)
    assert table is not None and [row.name for row in table.rows] == ["encoder.*.q", "decoder.*.q"]


@pytest.mark.parametrize(
    ("values", "least"), [([], 0.999), ([1.0], 0.999), ([0.9995, 0.991], 0.99), ([0.5], 0.5), ([0.1, 1.0], 0.0)]
)
def test_the_scale_begins_below_the_least_agreement(values: list[float], least: float, tmp_path: Path) -> None:
    masks = {f"layers.{number}.q": masks_of(value) for number, value in enumerate(values)}
    assert least_agreement([run_of(tmp_path, masks)]) == least


def test_a_picture_nobody_could_look_at_is_not_drawn(tmp_path: Path) -> None:
    """Every layer in a row and a column of its own: a million cells from a thousand layers."""
    run = run_of(tmp_path, {f"layers.{number}.x{number}": masks_of(1.0, p1100=1) for number in range(1300)})
    assert agreement(run, 0.5) is None and patterns_by_layer(run) is None


def test_runs_without_layers_have_no_tables(tmp_path: Path) -> None:
    run = run_of(tmp_path, {})
    assert agreement(run, 0.5) is patterns_by_kind(run) is patterns_by_layer(run) is None
    assert pattern_totals([("1", run)]) == []


def test_shares_of_patterns(tmp_path: Path) -> None:
    masks = {
        "layers.0.q": masks_of(1.0, p1100=30, p0011=10),
        "layers.1.q": masks_of(1.0, p1100=10, p1010=30),
        "layers.1.k": masks_of(1.0, p0011=5),
    }
    run = run_of(tmp_path, masks)
    (total,) = pattern_totals([("1 run", run)])
    assert list(total.columns) == ["1100", "1010", "0011"]
    assert [[cell.text for cell in row.cells if cell] for row in total.rows] == [["47.1", "35.3", "17.6"]]
    by_kind = patterns_by_kind(run)
    assert by_kind is not None
    assert {row.name: [cell.text for cell in row.cells if cell] for row in by_kind.rows} == {
        "q": ["50.0", "37.5", "12.5"],
        "k": ["0.0", "0.0", "100.0"],
    }
    by_layer = patterns_by_layer(run)
    assert by_layer is not None and [row.name for row in by_layer.rows] == list(masks)
    assert [cell.percent for cell in by_layer.rows[2].cells if cell] == [0, 0, MOST_HEAT_PERCENT]


def test_many_patterns_are_shown_by_column(tmp_path: Path) -> None:
    """Every pattern of 4:8 once, and twenty more of the one that keeps the first half."""
    kept = ["".join("01"[bit] for bit in row) for row in NMPattern(4, 8).candidates().int().tolist()]
    counts = dict.fromkeys(kept, 1)
    counts["11110000"] += 20
    run = run_of(tmp_path, {"layers.0.q": {"agreement": 1.0, "patterns": counts}})
    (table,) = pattern_totals([("1", run)])
    shares = [float(cell.text) for cell in table.rows[0].cells if cell]
    assert len(shares) == 8 and sum(shares) == pytest.approx(400, abs=0.5)
    assert shares[0] == round(100 * (35 + 20) / 90, 1) and shares[7] == round(100 * 35 / 90, 1)
    assert "70 patterns occur" in table.caption


def test_groups_of_different_sizes_have_a_table_each(tmp_path: Path) -> None:
    small = run_of(tmp_path, {"layers.0.q": masks_of(1.0, p1100=1)})
    large = run_of(tmp_path, {"layers.0.q": masks_of(1.0, p11110000=1)})
    none = run_of(tmp_path, {"layers.0.q": masks_of(1.0)})
    tables = pattern_totals([("1", small), ("2", large), ("3", none), ("4", small)])
    assert [[row.name for row in table.rows] for table in tables] == [["1", "4"], ["2"]]
