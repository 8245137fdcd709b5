"""Quality: every recipe on a model, the roads of results.md, and the frontier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.bench import frontier_chart, quality_table, record, schema
from tests.bench.quality import ROWS, WHAT
from tests.bench.tables.cells import markdown

TEXTS = ("wikitext2.test", "brown.valid", "speech.valid")
_ADMM, _BUDGET, _BLOCKS, _STRICT, _ANSWERS = (
    f"asymmetric--smollm2-135m--x86_64-2core--{time}"
    for time in ("20261126-225800", "20261127-020200", "20261127-054500", "20261127-125000", "20261128-120002")
)
_SWAPS, _FEW, _SHORT = (
    f"frozen--smollm2-135m--x86_64-2core--20261127-{time}" for time in ("150200", "164000", "194100")
)
_LOW_RANK = "low-rank--smollm2-135m--x86_64-2core--20261127-231600"
_LOW_RANK_INT4 = "low-rank--smollm2-135m--x86_64-2core--20261128-000330"
_LOW_RANK_TRAINED = "low-rank--smollm2-135m--x86_64-2core--20261128-033800"
_LOW_RANK_TRAINED_INT4 = "low-rank--smollm2-135m--x86_64-2core--20261128-060838"
_LOW_RANK_BUDGET = "low-rank--smollm2-135m--x86_64-2core--20261128-112411"
_LOW_RANK_BUDGET_TRAINED = "low-rank--smollm2-135m--x86_64-2core--20261128-115346"
_LOW_RANK_BUDGET_MIXED = "low-rank--smollm2-135m--x86_64-2core--20261128-150030"
_LOW_RANK_BUDGET_INT8 = "low-rank--smollm2-135m--x86_64-2core--20261128-185418"
_LOW_RANK_PERPLEXITY_INT8 = "low-rank--smollm2-135m--x86_64-2core--20261128-194639"
_INT4, _INT4_LATER = (f"int4-quality--smollm2-135m--x86_64-2core--20261127-{time}" for time in ("150300", "161500"))


def recipes(label: str) -> str:
    """Every row of the quality table that was measured on a model."""
    return quality_table.markdown(record.load(WHAT, label), {row.name: row.weights for row in ROWS})


@dataclass(frozen=True)
class Road:
    """A row: what was done, with how many tokens, and the record and the place in it that say how good it is."""

    shown: str
    tokens: str
    record: str
    row: int = 0


NO_RECORD = ["`sparsegpt`, 64 windows of 512", "33 k", "54.5", "", "107.5", "", "122.3", ""]
"""From before there were records of these texts; not measured again."""

ROADS = (
    Road("`sparseswaps`, 32 of the windows: the dense model's weights, masked", "16 k", _SWAPS),
    Road("then `maskllm-short --set train.steps=28 --set train.lr=1.3e-3`, the same weights", "0.1 M", _FEW),
    Road(
        "or `maskllm-short` with its 110 steps, from the same `sparseswaps` of 32 windows, where the recipe takes 64, "
        "the same weights",
        "0.5 M",
        _SHORT,
    ),
    Road("`admm`, the same windows, no training", "33 k", _ADMM),
    Road("then `eora`, rank 20: 0.62 of the bytes, not 0.5625", "33 k", _BUDGET),
    Road("`admm-lowrank`, rank 20: masks, weights and correction together, 0.62", "33 k", _LOW_RANK),
    Road(
        "then `best-effort-lowrank` with that as `--prior`, 100 steps, with the demo's texts, 0.62",
        "0.2 M",
        _LOW_RANK_TRAINED,
    ),
    Road("then `quantise --values int4 --data`, corrections solved for again, 0.255", "0.2 M", _LOW_RANK_TRAINED_INT4),
    Road("`admm-lowrank --set values.kind=int4`, rank 20: all of these together, 0.255", "33 k", _LOW_RANK_INT4),
    Road("`admm --set values.kind=int4`: masks and 4-bit values in one pass, 0.20 of the bytes", "33 k", _INT4),
    Road("`admm --bytes 0.75`", "33 k", _BUDGET, 1),
    Road("`best-effort --bytes 0.75`, 160 steps, with the demo's texts", "0.3 M", _BUDGET, 2),
    Road("the same from `admm --bytes 0.75`, training whole blocks, as `best-effort` now does", "0.3 M", _BLOCKS),
    Road("the same, 480 steps", "1.0 M", _BLOCKS, 1),
    Road("`admm-lowrank --bytes 0.75`, rank 20", "33 k", _LOW_RANK_BUDGET),
    Road(
        "then `best-effort-lowrank` with that as `--prior`, 48 steps, with the demo's texts",
        "0.1 M",
        _LOW_RANK_BUDGET_TRAINED,
    ),
    Road("or 260 steps, `train.distill_weight=0.67`", "0.5 M", _LOW_RANK_BUDGET_MIXED),
    Road("`admm-lowrank --bytes 0.75 --set values.kind=int8`, rank 20", "33 k", _LOW_RANK_BUDGET_INT8),
    Road(
        "then `best-effort-lowrank` with that as `--prior`, 200 steps, `train.lr=1e-4`, `train.distill_weight=0.67`, "
        "with the demo's texts, and `quantise --values int8`",
        "0.4 M",
        _LOW_RANK_BUDGET_INT8,
        1,
    ),
    Road(
        "`admm-lowrank --max-ppl-increase 0.05 --set values.kind=int8`, rank 20: 0.875 of the bytes",
        "33 k",
        _LOW_RANK_PERPLEXITY_INT8,
    ),
    Road("`admm`, then `best-effort`, 240 steps, with the demo's texts", "0.5 M", _ADMM, 1),
    Road("the same, training whole blocks", "0.5 M", _STRICT),
    Road("whole blocks, 240 steps, then `quantise --values int4 --data`: 0.20 of the bytes", "0.5 M", _INT4_LATER),
    Road("the pruned layers alone, 400 steps", "0.8 M", _BUDGET, 3),
    Road("whole blocks, 500 steps, from the dense model's answers alone", "1.0 M", _ANSWERS),
)


def roads() -> str:
    """SmolLM2-135M by every road; its own row is of the record that measured it last."""
    known = schema.current()
    dense = known[_STRICT]["rows"][0]["texts"]
    rows = [["dense", "", *_measured({name: dense[name]["dense"] for name in TEXTS})], NO_RECORD]
    for road in ROADS:
        rows.append([road.shown, road.tokens, *_measured(known[road.record]["rows"][road.row]["texts"])])
    return markdown(("", "tokens", *(head for name in TEXTS for head in (name, "KL"))), rows)


def _measured(texts: dict[str, Any]) -> list[str]:
    """Perplexity and KL divergence on each text; nothing where it was not measured."""
    cells = []
    for name in TEXTS:
        found = texts.get(name, {})
        cells.append(f"{found['perplexity']:.1f}" if found else "")
        cells.append(f"{found['divergence']['kl']:.3f}" if "divergence" in found else "")
    return cells


_LATER = {
    ("demo/calibration.txt", 32): "half as many windows",
    ("demo/calibration.txt", 128): "twice as many",
    ("demo/calibration.txt", 16): "as many tokens in windows of 2048",
}
"""Rows of the second record, by text and windows."""


def calibration() -> str:
    """SparseGPT by the text that it was calibrated on."""
    texts = (*TEXTS, "reviews.valid")
    rows = []
    for row in (row for result in record.load("calibration", "smollm2-135m") for row in result["rows"]):
        more = _LATER.get((row["calibration_text"], row["samples"]))
        what = row["calibration_text"] if more is None else f"`{row['calibration_text']}`, {more}"
        rows.append([what, str(row["samples"]), *(f"{row['perplexity'][name]:.1f}" for name in texts)])
    return markdown(("calibration text", "windows", *texts), rows)


def frontier() -> str:
    """Every point of SmolLM2-135M."""
    return frontier_chart.markdown(frontier_points(), frontier_speeds())


def frontier_points() -> dict[str, dict[str, Any]]:
    """Records of quality, by the names of points."""
    found = record.load("frontier", "smollm2-135m")
    return {result["point"]: result for result in found if "perplexity" in result}


def frontier_speeds() -> frontier_chart.Speeds:
    """Of the newest run in which points were served."""
    served = [result for result in record.load("frontier", "smollm2-135m") if "served" in result]
    return frontier_chart.speeds(served[-1]) if served else {}


TABLES = {
    "quality of demo": partial(recipes, "demo"),
    "quality of reference-7m": partial(recipes, "reference-7m"),
    "roads": roads,
    "calibration texts": calibration,
    "frontier of smollm2-135m": frontier,
}
