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
_LOW_RANK_BUDGET_TRAINED = "low-rank--smollm2-135m--x86_64-2core--20261128-150030"
_LOW_RANK_BUDGET_INT8 = "low-rank--smollm2-135m--x86_64-2core--20261128-185418"
_LOW_RANK_PERPLEXITY_INT8 = "low-rank--smollm2-135m--x86_64-2core--20261128-194639"
_LOW_RANK_BUDGET_INT8_MIX = "low-rank--smollm2-135m--x86_64-2core--20261129-090955"
_IN_MINUTES = "low-rank--smollm2-135m--x86_64-2core--20261128-232750"
_IN_MINUTES_STRICT = "low-rank--smollm2-135m--x86_64-2core--20261129-084000"
_IN_HOURS = "low-rank--smollm2-135m--x86_64-2core--20261129-023630"
_INT4, _INT4_LATER = (f"int4-quality--smollm2-135m--x86_64-2core--20261127-{time}" for time in ("150300", "161500"))


def recipes(label: str) -> str:
    """Every row of the quality table that was measured on a model."""
    return quality_table.markdown(record.load(WHAT, label), {row.name: row.weights for row in ROWS})


@dataclass(frozen=True)
class Road:
    """A row: what was done, its share of the dense bytes, and the record that says how good it is, and where in it."""

    shown: str
    share: str
    record: str
    row: int = 0


NO_RECORD = ["`sparsegpt`, 64 windows of 512", "0.5625", "0.03", "", "", "54.5", "107.5", "122.3", "", ""]
"""From before there were records of these texts; not measured again."""

ROADS = (
    Road("`sparseswaps`, 32 windows: weights of dense, masked", "0.5625", _SWAPS),
    Road("then `maskllm-short`, 110 steps: weights of dense, masked", "0.5625", _SHORT),
    Road("`admm`", "0.5625", _ANSWERS, 1),
    Road("then `best-effort`, 240 steps", "0.5625", _STRICT),
    Road("then, instead, 400 steps, of the pruned layers alone", "0.5625", _BUDGET, 3),
    Road("then, instead, 500 steps from the dense model's answers alone", "0.5625", _ANSWERS),
    Road("`best-effort --minutes 10`", "0.5625", _IN_MINUTES_STRICT),
    Road("`admm`, then `eora`, rank 20", "0.62", _BUDGET),
    Road("`admm-lowrank`", "0.62", _LOW_RANK),
    Road("then `best-effort-lowrank`, 100 steps", "0.62", _LOW_RANK_TRAINED),
    Road("`best-effort-lowrank --minutes 30 --set train.distill_weight=0.67`", "0.62", _IN_MINUTES, 1),
    Road("then 600 steps more", "0.62", _IN_HOURS),
    Road("the dense model after 288 steps: `dense_control`", "1", _IN_HOURS, 1),
    Road("`admm --bytes 0.75`", "0.75", _BUDGET, 1),
    Road("then `best-effort`, 480 steps", "0.75", _BLOCKS, 1),
    Road("`admm-lowrank --bytes 0.75`", "0.75", _LOW_RANK_BUDGET),
    Road("then `best-effort-lowrank`, 260 steps", "0.75", _LOW_RANK_BUDGET_TRAINED),
    Road("`admm-lowrank --bytes 0.75 --set values.kind=int8`", "0.75", _LOW_RANK_BUDGET_INT8),
    Road(
        "then `best-effort-lowrank`, 200 steps, `train.lr=1e-4`, and `quantise --values int8`",
        "0.75",
        _LOW_RANK_BUDGET_INT8,
        1,
    ),
    Road("then, instead, the same with `train.distill_weight=0.67`", "0.75", _LOW_RANK_BUDGET_INT8_MIX),
    Road("`admm-lowrank --max-ppl-increase 0.05 --set values.kind=int8`", "0.875", _LOW_RANK_PERPLEXITY_INT8),
    Road("`admm --set values.kind=int4`", "0.20", _INT4),
    Road("`admm`, `best-effort`, 240 steps, then `quantise --values int4 --data`", "0.20", _INT4_LATER),
    Road("`admm-lowrank --set values.kind=int4`", "0.255", _LOW_RANK_INT4),
    Road(
        "`admm-lowrank`, `best-effort-lowrank`, 100 steps, then `quantise --values int4 --data`",
        "0.255",
        _LOW_RANK_TRAINED_INT4,
    ),
)


def roads() -> str:
    """SmolLM2-135M by every road; its own row is of the record that measured it last."""
    known = schema.current()
    dense = known[_STRICT]["rows"][0]["texts"]
    rows = [
        ["dense", "1", "", "", "", *(f"{dense[name]['dense']['perplexity']:.1f}" for name in TEXTS), "", ""],
        NO_RECORD,
    ]
    rows += [_cells(road, known[road.record]["rows"][road.row]) for road in ROADS]
    return markdown(("", "bytes", "M tokens", "minutes", "GB", *TEXTS, "KL", "top-1, %"), rows)


def _cells(road: Road, row: dict[str, Any]) -> list[str]:
    """What it took, and perplexity, KL divergence and agreement on each text; nothing where it was not measured."""
    tokens, held = row.get("tokens"), row.get("peak_memory_bytes")
    minutes = row.get("cpu_minutes", row.get("minutes"))
    cost = [
        "" if tokens is None else f"{tokens / 1e6:.2f}".removesuffix("0"),
        "" if minutes is None else f"{minutes:.0f}",
        "" if held is None else f"{held / 1e9:.1f}",
    ]
    found = [row["texts"].get(name) for name in TEXTS]
    perplexity = ["" if text is None else f"{text['perplexity']:.1f}" for text in found]
    divergence = ["-" if text is None else f"{text['divergence']['kl']:.3f}" for text in found]
    agreement = ["-" if text is None else f"{100 * text['divergence']['agreement']:.0f}" for text in found]
    return [road.shown, road.share, *cost, *perplexity, ", ".join(divergence), ", ".join(agreement)]


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
