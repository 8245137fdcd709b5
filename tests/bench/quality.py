"""The quality table: `python -m tests.bench.quality --model DIR --train TEXT ... --eval TEXT ...`, or `make quality`.

Every row is one `maskgen run` as a user would type it, then one `maskgen eval` on what it wrote, against the dense
model and on all texts. A row that has a result file for the same model, data and recipe is not run again, and a run
that was stopped continues where it was, so the whole table can be made in pieces: a row of `--rows one-shot` takes
minutes for a model of 135 M parameters on two cores, one of a learned method longer. `--set` changes a value in every
recipe that has it. Result files are never edited; `--table` prints what there is, and `--plot FILE.svg` draws it.

gap(x) = (perplexity of x - dense) / (perplexity of sparsegpt, weights updated - dense): 0 is lossless, 1 is SparseGPT.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgen.core.digest import digest_files, digest_json, digest_weights
from maskgen.hf import model
from maskgen.methods import LocalMethod
from maskgen.recipes import recipe
from maskgen.train import log as trainlog
from maskgen.train.log import LOG_FILE
from tests.bench import quality_table, record

WHAT = "quality"
ONE_SHOT = "one-shot"
"""For `--rows`: every row of a recipe that trains nothing, on the model itself, plain and reordered."""


@dataclass(frozen=True)
class Row:
    """One line: a recipe with overrides. `seeds` many runs; `prior` names the row whose masks it starts from.

    `domain` trains on that one of the training texts instead of on all of them. `weights` "stay" as they were, or
    "change". `reorder` names the recipe by whose scores `maskgen permute` orders the neurons first.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    prior: str | None = None
    domain: str | None = None
    weights: str = "stay"
    reorder: str | None = None


FORWARD_TOKENS = 2048
"""Of one forward pass of `maskgen eval`; bounds its memory."""

CHANGE = "change"
TUNED = ("method.lora_rank=8", "train.steps=300", "train.lr=1e-2", "train.distill_weight=0.9")
SHORT = ("train.steps=100", "train.lr=2e-3")
ROWS = (
    Row("magnitude", "magnitude"),
    Row("wanda", "wanda", seeds=2),
    Row("ria", "ria", seeds=2),
    Row("sparsegpt, mask only", "sparsegpt-mask-only", seeds=2),
    Row("sparsegpt", "sparsegpt", seeds=2, weights=CHANGE),
    Row("admm", "admm", seeds=2, weights=CHANGE),
    Row("reconstruct", "reconstruct", seeds=2, weights=CHANGE),
    Row("best-effort", "best-effort", seeds=2, weights=CHANGE),
    Row("maskllm", "maskllm", seeds=2),
    Row("proxsparse", "proxsparse", seeds=2),
    Row("adaptive_sparse", "adaptive_sparse", seeds=2, weights=CHANGE),
    Row("adaptive_sparse + slorb", "adaptive_sparse_slorb", seeds=2, weights=CHANGE),
    Row("dense, same extra steps", "dense_control", seeds=2, weights=CHANGE),
    Row("dense, same extra steps, no distillation", "dense_control", ("train.distill_weight=0.0",), weights=CHANGE),
    Row("maskllm, then admm repair", "admm", ("method.mask=prior",), prior="maskllm", weights=CHANGE),
    Row("maskllm, then adaptive_sparse", "adaptive_sparse", ("method.mask=prior",), prior="maskllm", weights=CHANGE),
    Row("magnitude, reordered", "magnitude", reorder="ria"),
    Row("wanda, reordered", "wanda", reorder="ria"),
    Row("ria, reordered", "ria", reorder="ria"),
    Row("sparsegpt, mask only, reordered", "sparsegpt-mask-only", reorder="ria"),
    Row("sparsegpt, reordered", "sparsegpt", weights=CHANGE, reorder="ria"),
    Row("admm, reordered", "admm", weights=CHANGE, reorder="ria"),
    Row("maskllm, reordered", "maskllm", reorder="ria"),
    Row("adaptive_sparse, reordered", "adaptive_sparse", weights=CHANGE, reorder="ria"),
    Row("maskprune", "maskprune", seeds=2, weights=CHANGE),
    Row("structured magnitude", "structured_magnitude", weights=CHANGE),
    Row("structured taylor", "structured_taylor", weights=CHANGE),
    Row("structured taylor, same adapters and steps", "structured_taylor", TUNED, weights=CHANGE),
    Row("maskllm, 100 steps", "maskllm", SHORT),
    Row("maskllm, 100 steps, no distillation", "maskllm", (*SHORT, "train.distill_weight=0.0")),
    Row("maskllm, 100 steps, no prior", "maskllm", (*SHORT, "method.prior_strength=0.0")),
    Row("maskllm, 100 steps, additive logits", "maskllm", (*SHORT, "method.logits=additive")),
    Row("maskllm, 100 steps, peps, from scratch", "maskllm", SHORT, domain="peps.train"),
    Row("maskllm, 100 steps, peps, transfer", "maskllm", SHORT, domain="peps.train", prior="maskllm"),
    Row("maskllm, 100 steps, reviews, from scratch", "maskllm", SHORT, domain="reviews.train"),
    Row("maskllm, 100 steps, reviews, transfer", "maskllm", SHORT, domain="reviews.train", prior="maskllm"),
)


def main() -> None:
    """Run what is missing, then print the table."""
    args = _arguments()
    facts = {
        "model_digest": digest_weights(args.model),
        "train_digest": digest_files(args.train),
        "eval_digest": digest_files(args.eval),
        "window_tokens": args.window,
        "max_windows": args.windows,
    }
    if args.dtype != "float32":  # absent otherwise, as in results from before it could be chosen
        facts["dtype"] = args.dtype
    if not args.table:
        _measure_dense(args, facts)
        for row in ROWS:
            for seed in range(row.seeds):
                if row.name in args.rows and seed in args.seeds:
                    _measure(args, row, seed, facts)
    keys = {_key(args, row, seed, facts) for row in ROWS for seed in range(row.seeds)} | {_dense_key(facts)}
    results = [result for result in record.load(WHAT, args.label) if result["key"] in keys]  # not of earlier recipes
    print(quality_table.markdown(results, {row.name: row.weights for row in ROWS}))  # noqa: T201
    if args.plot:
        quality_table.plot(results, [row.name for row in ROWS], args.plot)


def _measure_dense(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    if not _known(args, key := _dense_key(facts)):
        result = {"key": key, "row": "dense", "seed": None, **facts, **score(args, args.model)}
        record.save(WHAT, args.label, result, ["row", "seed", *facts])


def _dense_key(facts: dict[str, Any]) -> str:
    return digest_json({"row": "dense", **facts})


def _measure(args: argparse.Namespace, row: Row, seed: int, facts: dict[str, Any]) -> None:
    wanted = _settled(args, row.recipe, _overrides(args, row, seed))
    key = _key(args, row, seed, facts)
    if _known(args, key):
        return
    out = _directory(args, row, seed, facts)
    train = [text for text in args.train if row.domain in (None, text.stem)]
    command = ["run", row.recipe, "--model", str(_base(args, row, seed)), "--data", *map(str, train), "--out", str(out)]
    for override in _overrides(args, row, seed):
        command += ["--set", override]
    if row.prior is not None:
        command += ["--prior", str(_directory(args, _row(row.prior), seed, facts))]
    if wanted.train is not None:
        command += ["--micro-batch", str(args.micro_batch)]
    cost = {} if out.exists() else maskgen(command)
    result = {
        "key": key,
        "row": row.name,
        "seed": seed,
        "recipe": wanted.resolved(),
        "reorder": row.reorder,
        "command": " ".join(["maskgen", *(Path(word).name if Path(word).is_absolute() else word for word in command)]),
        **facts,
        **(_cost(out) or {"tokens": _calibration_tokens(wanted), **cost}),
        **score(args, out, args.model),
    }
    record.save(WHAT, args.label, result, ["row", "seed", *facts])


def _base(args: argparse.Namespace, row: Row, seed: int) -> Path:
    """The dense model a row starts from, with its neurons reordered if it says so."""
    dense: Path = args.model
    if row.reorder is None:
        return dense
    settings = [*(setting for setting in args.set if setting.startswith("calibration.")), f"calibration.seed={seed}"]
    wanted = _settled(args, row.reorder, settings)
    key = digest_json([wanted.digest(), digest_weights(dense), digest_files(args.train)])
    reordered: Path = args.work / f"reordered-{row.reorder}-seed{seed}-{key[7:15]}"
    if not reordered.exists():
        command = ["permute", row.reorder, "--model", str(dense), "--data", *map(str, args.train)]
        maskgen([*command, *(word for setting in settings for word in ("--set", setting)), "--out", str(reordered)])
    return reordered


def _settled(args: argparse.Namespace, name: str, overrides: list[str]) -> recipe.Recipe:
    """The recipe as `maskgen run` takes it for this model."""
    return recipe.load(name, overrides).for_context(model.stored_max_tokens(args.model)).on_device("cpu")


def _overrides(args: argparse.Namespace, row: Row, seed: int) -> list[str]:
    sections = ["calibration"] if recipe.load(row.recipe).train is None else ["calibration", "train"]
    chosen = [setting for setting in args.set if setting.partition(".")[0] in sections]
    return [*row.overrides, *chosen, *(f"{section}.seed={seed}" for section in sections)]


def _key(args: argparse.Namespace, row: Row, seed: int, facts: dict[str, Any]) -> str:
    """What decides the numbers of a run: its recipe, model and texts, and the run whose masks it starts from."""
    decides = {
        "recipe": _settled(args, row.recipe, _overrides(args, row, seed)).digest(),
        "prior": None if row.prior is None else _key(args, _row(row.prior), seed, facts),
        "domain": row.domain,
        **facts,
    }
    if row.reorder is not None:  # absent otherwise, so that results from before there was such a thing keep their keys
        decides["reorder"] = row.reorder
    return digest_json(decides)


def _directory(args: argparse.Namespace, row: Row, seed: int, facts: dict[str, Any]) -> Path:
    """Where a run is kept. The name holds its key, so that a changed recipe is never mistaken for the old one."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in row.name)
    work: Path = args.work
    return work / f"{slug}-seed{seed}-{_key(args, row, seed, facts)[7:15]}"


def _row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def score(args: argparse.Namespace, directory: Path, dense: Path | None = None) -> dict[str, Any]:
    """Of a directory, by text of `args.eval`: perplexity, and from the `dense` model KL divergence and agreement."""
    report = args.work / f"{directory.name}.eval.json"
    batch = max(1, FORWARD_TOKENS // args.window)
    limits = ["--window", args.window, "--max-windows", args.windows, "--batch", batch, "--dtype", args.dtype]
    against = [] if dense is None else ["--against", dense]
    maskgen(list(map(str, ["eval", directory, "--data", *args.eval, *limits, *against, "--json", report])))
    found = json.loads(report.read_text())
    texts = dict(zip([text.stem for text in args.eval], found.get("texts", [found]), strict=True))
    scores = {"perplexity": {name: text["perplexity"] for name, text in texts.items()}}
    for name in () if dense is None else ("kl", "agreement"):
        scores[name] = {text: numbers["divergence"][name] for text, numbers in texts.items()}
    return scores


def _cost(directory: Path) -> dict[str, Any]:
    """Tokens, minutes and memory of a learned run, over all its restarts, from its own log; else nothing."""
    log = directory / LOG_FILE
    if not log.exists():
        return {}
    steps = [entry for entry in trainlog.read(log) if entry["kind"] == "step"]
    return {
        "tokens": sum(entry["tokens"] for entry in steps),
        "train_s": steps[-1]["elapsed_s"],
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in steps),
    }


def _calibration_tokens(wanted: recipe.Recipe) -> int:
    if not wanted.needs_data:
        return 0
    assert wanted.calibration.window_tokens is not None
    return wanted.calibration.samples * wanted.calibration.window_tokens


def maskgen(arguments: list[str]) -> dict[str, float]:
    """Run it to its end; how long it took, imports included, and its peak memory."""
    started_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "maskgen", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return {"train_s": time.perf_counter() - started_s, "peak_memory_bytes": usage.ru_maxrss * 1024}


def _known(args: argparse.Namespace, key: str) -> bool:
    return any(result["key"] == key for result in record.load(WHAT, args.label))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--label", required=True, help="names the model in the result files")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="texts to calibrate and learn on")
    parser.add_argument("--eval", type=Path, nargs="+", required=True, help="texts to score, never trained on")
    parser.add_argument("--work", type=Path, required=True, help="where runs and checkpoints are kept")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a scored window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="windows scored of each text (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of scoring (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every recipe that has it")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows of a training step at a time")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"only these, or {ONE_SHOT} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--plot", type=Path, help="also draw the table, as .svg")
    args = parser.parse_args()
    args.rows = _rows(parser, args.rows)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def _rows(parser: argparse.ArgumentParser, names: list[str] | None) -> set[str]:
    """The rows that were asked for."""
    rows = {row.name: row for row in ROWS}
    plain = {name: recipe.load(row.recipe).build_method() for name, row in rows.items() if row.prior is None}
    one_shot = {name for name, method in plain.items() if isinstance(method, LocalMethod)}
    known = {**{name: {name} for name in rows}, ONE_SHOT: one_shot, quality_table.DENSE: set[str]()}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        parser.error(f"--rows: no row {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    return set(rows) if names is None else set().union(*(known[name] for name in names))


if __name__ == "__main__":
    main()
