"""The quality table as Markdown and as a plot, from result files. See `tests.bench.quality`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DENSE, REFERENCE = "dense", "sparsegpt"
"""The rows that `gap` is 0 and 1 for."""


def markdown(results: Sequence[dict[str, Any]], rows: Mapping[str, str]) -> str:
    """One line a row: mean ± standard deviation over seeds of what was measured on each text, mean gap on each, cost.

    `rows` says of every row, in order, what happens to the weights. KL divergence from dense, in nats per token, and
    top-1 agreement are columns where they were measured.
    """
    texts = list(results[0]["perplexity"]) if results else []
    compared = any("kl" in result for result in results)
    headings = [heading for text in texts for heading in ((text, "KL", "top-1") if compared else (text,))]
    lines = [
        f"| row | weights | seeds | {' | '.join(headings)} | gap on each | M tokens | minutes | peak GB |",
        "|---|---|---:" + "|---:" * len(headings) + "|---|---:|---:|---:|",
    ]
    for name, weights in {DENSE: "", **rows}.items():
        mine = [result for result in results if result["row"] == name]
        if mine:
            cells = [cell for text in texts for cell in _measured(mine, text, compared)]
            means = [statistics.mean(found) for text in texts if (found := gaps(results, name, text))]
            cells += [", ".join(f"{mean:.2f}" for mean in means), *_cost(mine)]
            lines.append(f"| {name} | {weights} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _measured(mine: Sequence[dict[str, Any]], text: str, compared: bool) -> list[str]:
    """Cells of a text: perplexity, and KL divergence and agreement in a table that has them."""
    cells = [_spread([result["perplexity"][text] for result in mine])]
    if compared:
        cells.append(_spread([result["kl"][text] for result in mine if "kl" in result], 3))
        percent = [100 * result["agreement"][text] for result in mine if "agreement" in result]
        cells.append(_spread(percent, 1) + (" %" if percent else ""))
    return cells


def gaps(results: Sequence[dict[str, Any]], name: str, text: str) -> list[float]:
    """gap of every seed of a row; empty while a row it needs is missing."""
    dense = [result["perplexity"][text] for result in results if result["row"] == DENSE]
    reference = [result["perplexity"][text] for result in results if result["row"] == REFERENCE]
    if not dense or not reference:
        return []
    scale = statistics.mean(reference) - dense[0]
    return [(result["perplexity"][text] - dense[0]) / scale for result in results if result["row"] == name]


def plot(results: Sequence[dict[str, Any]], order: Sequence[str], path: Path) -> None:
    """Mean gap over all texts of every row, as a bar chart with a dot for every seed and text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    texts = list(results[0]["perplexity"])
    rows = [name for name in order if any(result["row"] == name for result in results)]
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for position, name in enumerate(reversed(rows)):
        per_text = [statistics.mean(gaps(results, name, text)) for text in texts]
        axes.barh(position, statistics.mean(per_text), color="#4c72b0", height=0.7)
        points = [gap for text in texts for gap in gaps(results, name, text)]
        axes.plot(points, [position] * len(points), ".", color="#222222", markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_xlabel("gap in perplexity: 0 is dense, 1 is SparseGPT\nbar: mean of texts; dots: every text and seed")
    with rc_context({"svg.hashsalt": "quality"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _cost(mine: Sequence[dict[str, Any]]) -> list[str]:
    tokens = [result["tokens"] / 1e6 for result in mine if "tokens" in result]
    minutes = [result["train_s"] / 60 for result in mine if "train_s" in result]
    memory = [result["peak_memory_bytes"] / 1e9 for result in mine if "peak_memory_bytes" in result]
    return [f"{statistics.mean(values):.1f}" if values else "" for values in (tokens, minutes, memory)]


def _spread(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
