"""What single records of pruning say: a budget, one-shot masks, 8-bit values, served against offline."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.bench import record
from tests.bench.tables.cells import deviation, markdown

_LABEL = "reference-7m"
_QUANTISED = {
    "sparsegpt": "sparsegpt",
    "maskllm": "maskllm",
    "adaptive-sparse": "adaptive_sparse",
    "adaptive-sparse---slorb": "adaptive_sparse, slorb",
}
"""Directories of checkpoints, without seed and key, and what they are."""

_ONE_SHOT = {"sparsegpt-mask-only": "sparsegpt, mask only", "sparsegpt": "sparsegpt, weights updated"}


def budget() -> str:
    """SmolLM2-135M at 0.75 of the bytes, dense, and sparse throughout."""
    (result,) = record.load("budget", "smollm2-135m")
    texts = result["rows"][0]["texts"]
    whole = record.load("calibration", "smollm2-135m")[0]["rows"][0]["perplexity"]
    rows = [
        ["dense", "1", *(f"{text['dense']:.1f}" for text in texts.values())],
        ["`--bytes 0.75`", f"{result['rows'][0]['budget']['bytes']:.3f}"]
        + [f"{text['perplexity']:.1f}" for text in texts.values()],
        ["all layers (64 windows)", "0.5625", *(f"{whole[name]:.1f}" for name in texts)],
    ]
    return markdown(("", "bytes", *texts), rows)


def one_shot() -> str:
    """Perplexity and time of one-shot recipes, mean and deviation over seeds of calibration."""
    (result,) = record.load("one-shot", f"{_LABEL}-mix")
    by_recipe: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        by_recipe[row["recipe"]].append(row)
    texts = result["rows"][0]["perplexity"]
    rows = []
    for name, runs in by_recipe.items():
        times = [run["s_per_million_weights"] for run in runs if "s_per_million_weights" in run]
        measured = [deviation([run["perplexity"][text] for run in runs]) for text in texts]
        rows.append([_ONE_SHOT.get(name, name), *measured, f"{sum(times) / len(times):.2f}" if times else ""])
    return markdown(("recipe", *texts, "s per million weights"), rows)


def quantised() -> str:
    """Checkpoints with 8-bit values beside the same in bfloat16."""
    (result,) = record.load("quantised-quality", _LABEL)
    texts = next(iter(result["rows"].values()))["float"]["perplexity"]
    rows = []
    for directory, by_values in result["rows"].items():
        name = _QUANTISED[directory.rpartition("-seed")[0]]
        for values, found in by_values.items():
            kind = "bfloat16" if values == "float" else values
            rows.append([name, kind, f"{found['bytes_of_dense']:.4f}"])
            rows[-1] += [f"{perplexity:.2f}" for perplexity in found["perplexity"].values()]
    return markdown(("checkpoint", "values", "bytes of dense", *texts), rows, texts=2)


def served() -> str:
    """What transformers and vLLM make of one checkpoint, from the gate's report."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        (report,) = record.load("gate", f"{_LABEL}-sparsegpt-mix-{dtype}")
        offline, online = (report["evidence"]["sparse"][stack]["perplexity"] for stack in ("offline", "served"))
        numbers = {result["check"]: result["numbers"] for result in report["results"]}
        difference = 100 * numbers["parity"]["sparse_relative_difference"]
        shown = f"{difference:.4f} %" if difference >= 1e-4 else "< 0.0001 %"
        rows.append([dtype, f"{offline:.4f}", f"{online:.4f}", shown, f"{numbers['memory']['fraction']:.4f} of dense"])
    head = (
        "dtype",
        "offline (transformers)",
        "served (vLLM, compressed)",
        "difference",
        "resident bytes of sparse layers",
    )
    return markdown(head, rows)


TABLES = {
    "a budget": budget,
    "one-shot masks of the 7 M model": one_shot,
    "8-bit values of the 7 M model": quantised,
    "served against offline": served,
}
