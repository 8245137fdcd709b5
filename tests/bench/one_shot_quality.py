"""Perplexity of every one-shot recipe on one model: `python -m tests.bench.one_shot_quality --model DIR ...`.

Each recipe is run by the ordinary `sweep` with several calibration seeds, and the pruned model is scored on every
evaluation text in float32. One JSON file per run of this script goes to `tests/bench/results/`; old ones are never
edited. A Markdown table is printed. On a machine with two cores and a model of 7 M parameters, a run takes minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from maskgen.core.digest import digest_weights
from maskgen.core.perplexity import Protocol
from maskgen.data import tokens
from maskgen.hf import evaluate, model
from maskgen.hf.planning import plan_of
from maskgen.recipes import recipe
from maskgen.sweep.driver import sweep
from tests.bench import record

RECIPES = ("magnitude", "wanda", "sparsegpt-mask-only", "sparsegpt")


def main() -> None:
    """Measure, write JSON, print the table."""
    args = _arguments()
    tokenizer = model.load_tokenizer(args.model)
    protocol = Protocol(args.window, max_windows=args.max_windows)
    texts = {path.stem: tokens.read_tokens(path, tokenizer).tolist() for path in args.eval}
    rows = [{"recipe": "dense", "seed": None, "perplexity": _score(model.load(args.model), texts, protocol)}]
    for name in args.recipes:
        needs_data = recipe.load(name, []).local_method().needs_data
        for seed in args.seeds if needs_data else [None]:
            rows.append(_measure(args, name, seed, tokenizer, texts, protocol))
            print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    facts = {
        "model_digest": digest_weights(args.model),
        "calibration": [path.name for path in args.calibrate],
        "evaluation": [path.name for path in args.eval],
        "window_tokens": args.window,
        "max_windows": args.max_windows,
        "rows": rows,
    }
    path = record.save("one-shot", args.label, facts)
    print(table(rows), f"\nwritten: {path.name}")  # noqa: T201


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a recipe, mean and spread over seeds."""
    texts = list(rows[0]["perplexity"])
    lines = [
        "| recipe | " + " | ".join(texts) + " | s per million weights |",
        "|---" + "|---:" * (len(texts) + 1) + "|",
    ]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == name]
        cells = [_cell([row["perplexity"][text] for row in mine]) for text in texts]
        cost = [row["s_per_million_weights"] for row in mine if "s_per_million_weights" in row]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{statistics.mean(cost):.2f}' if cost else ''} |")
    return "\n".join(lines)


def _measure(
    args: argparse.Namespace,
    name: str,
    seed: int | None,
    tokenizer: Any,
    texts: dict[str, list[int]],
    protocol: Protocol,
) -> dict[str, Any]:
    wanted = recipe.load(name, [f"calibration.window_tokens={args.window}", f"calibration.seed={seed or 0}"])
    calibration, windows = wanted.calibration, None
    if seed is not None:
        generator = torch.Generator().manual_seed(calibration.seed)
        windows = tokens.calibration_windows(
            args.calibrate, tokenizer, calibration.samples, calibration.window_tokens, generator
        )
    pruned = model.load(args.model)
    todo = plan_of(args.model, wanted.pattern, model=pruned)
    with tempfile.TemporaryDirectory() as work:
        report, _ = sweep(pruned, todo, wanted, windows, Path(work) / "work", digest_weights(args.model))
    return {
        "recipe": name,
        "seed": seed,
        "recipe_digest": wanted.digest(),
        "perplexity": _score(pruned, texts, protocol),
        "s_per_million_weights": report.s_per_million_weights,
    }


def _score(scored: torch.nn.Module, texts: dict[str, list[int]], protocol: Protocol) -> dict[str, float]:
    scored = scored.float()
    return {name: evaluate.perplexity(scored, ids, protocol, batch=8).value for name, ids in texts.items()}


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--label", required=True, help="names the model and calibration in the result file")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="calibration texts, dealt evenly")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="texts to score")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=400)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="shipped recipes to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
