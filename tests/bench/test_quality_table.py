"""The table's cells, with and without what is measured against the dense model."""

from __future__ import annotations

from typing import Any

from tests.bench.quality_table import markdown


def result(row: str, seed: int | None, perplexity: float, **compared: float) -> dict[str, Any]:
    numbers = {name: {"wiki": value} for name, value in compared.items()}
    return {"row": row, "seed": seed, "perplexity": {"wiki": perplexity}, **numbers}


def cells(results: list[dict[str, Any]]) -> list[list[str]]:
    lines = markdown(results, {"sparsegpt": "change", "wanda": "stay", "not measured": "stay"}).splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len({len(line) for line in found}) == 1
    return [found[0], *found[2:]]


def test_perplexity_alone() -> None:
    assert cells([result("dense", None, 20.0), result("sparsegpt", 0, 30.0), result("wanda", 0, 40.0)]) == [
        ["row", "weights", "seeds", "wiki", "gap on each", "M tokens", "minutes", "peak GB"],
        ["dense", "", "1", "20.00", "0.00", "", "", ""],
        ["sparsegpt", "change", "1", "30.00", "1.00", "", "", ""],
        ["wanda", "stay", "1", "40.00", "2.00", "", "", ""],
    ]


def test_divergence_and_agreement_stand_beside_every_text() -> None:
    both = [result("wanda", seed, 40.0, kl=0.5 + seed / 10, agreement=0.7 + seed / 50) for seed in (0, 1)]
    assert cells([result("dense", None, 20.0), *both]) == [
        ["row", "weights", "seeds", "wiki", "KL", "top-1", "gap on each", "M tokens", "minutes", "peak GB"],
        ["dense", "", "1", "20.00", "", "", "", "", "", ""],
        ["wanda", "stay", "2", "40.00 ± 0.00", "0.550 ± 0.071", "71.0 ± 1.4 %", "", "", "", ""],
    ]
