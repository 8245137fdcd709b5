"""Time and memory: of a served model, of training a mask, of a sweep; and how often the gate is wrong."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from tests.bench import record
from tests.bench.tables.cells import markdown, percent

_WAYS = {
    "in-process": "vLLM's engine, read in the server's process",
    "grpc": "gRPC, a connection for each stream",
    "grpc-shared": "gRPC, one connection",
    "vllm-grpc": "vLLM's protocol (`--smg`)",
    "http": "HTTP",
}
_TASKS = {
    "the same model": "tasks: the same model",
    "0.2 % of samples lost and 0.2 % won (rounding)": "tasks: 0.2% lost, 0.2% won",
    "3 points down: 4 % lost, 1 % won": "tasks: 4.0% lost, 1.0% won",
    "3 points down: 6 % lost, 3 % won": "tasks: 6.0% lost, 3.0% won",
    "the same beside two tasks that stay": "tasks: 6 % lost, 3 % won, beside two that stay",
    "3 points down: 8 % lost, 5 % won": "tasks: 8.0% lost, 5.0% won",
    "as good, other mistakes: 1 % lost and won": "tasks: 1.0% lost, 1.0% won",
    "as good, other mistakes: 3 % lost and won": "tasks: 3.0% lost, 3.0% won",
}
_OTHERS = {
    "the same model, 1 % allowed": "perplexity: the same model, limit 1 %",
    "perplexity 2 % up, 1 % allowed": "perplexity: +2 %, limit 1 %",
    "perplexity 1 % up, 1 % allowed, one text": "perplexity: +1 %, limit 1 %, one text",
    "as fast, noise of 15 %, 3 % allowed": "speed: +0%, noise of 15%, limit 3%",
    "5 % slower, noise of 15 %, 3 % allowed": "speed: +5%, noise of 15%, limit 3%",
    "as fast, noise of 2 %, 3 % allowed": "speed: +0%, noise of 2%, limit 3%",
    "5 % slower, noise of 2 %, 3 % allowed": "speed: +5%, noise of 2%, limit 3%",
}


def served() -> str:
    """A random Llama of 352 M prunable weights, dense and 2:4, the runs that hold."""
    runs = record.load("serve", "llama-352m-random")
    rows = []
    for clients in (1, 8):
        for number, run in enumerate(runs):
            found = {row["metric"]: row for row in run["results"] if row["clients"] == clients}
            decode, first = found["decode_tokens_per_s"], found["ttft_ms"]
            rows.append([str(clients) if number == 0 else "", f"{decode['dense']:.1f}", f"{decode['sparse']:.1f}"])
            rows[-1] += [_ratio(decode), f"{first['dense']:.0f}", f"{first['sparse']:.0f}", _ratio(first)]
    head = ("clients", "decode, tokens/s: dense", "2:4", "", "first token, ms: dense", "2:4", "")
    return markdown(head, rows, texts=0).replace(
        "|---:|---:|---:|---:|---:|---:|---:|", "|---:|---:|---:|---|---:|---:|---|"
    )


def _ratio(row: dict[str, Any]) -> str:
    """Speedups of the rounds: lowest, highest, median."""
    return f"{min(row['ratios']):.2f}x to {max(row['ratios']):.2f}x, median {row['ratio']:.2f}x"


def mask_memory() -> str:
    """One step of MaskLLM with bfloat16 moments, recomputed, by plain autograd."""
    rows = []
    for run in record.load("mask-memory", "llama-640x14"):
        tokens = run["tokens"]["windows"] * run["tokens"]["window_tokens"]
        (row,) = (row for row in run["rows"] if row["variant"] == "recomputed, bfloat16 moments")
        ratios = [f"{row[f'peak_{what}_ratio']:.3f}" for what in ("tensor", "process")]
        rows.append([str(tokens), f"{row['tensor_bytes_per_weight']:.1f}", *ratios, f"{row['step_ratio']:.3f}"])
    return markdown(
        ("tokens per step", "tensors, bytes per weight", "of plain autograd", "process", "time"), rows, texts=0
    )


def sweep() -> str:
    """Time and memory of one-shot recipes on a random Llama."""
    (run,) = record.load("sweep-cost", "llama-640x14")
    rows = []
    for row in run["rows"]:
        above_mb = (row["peak_rss_bytes"] - row["before_model_bytes"]) / 1e6
        rows.append([row["recipe"], f"{row['s_per_million_weights']:.2f}", f"{above_mb:.0f} MB"])
    return markdown(("recipe", "s per million weights", "peak memory above the imports"), rows)


def gate_errors(shown: dict[str, str]) -> str:
    """Shares of verdicts in simulated runs, by what is true in them."""
    run = record.load("gate-errors", "simulated")[-1]
    found = {row["truth"]: row for row in run["rows"]}
    verdicts = ("fail", "pass", "inconclusive")
    rows = [[label, *(percent(found[truth][verdict]) for verdict in verdicts)] for label, truth in shown.items()]
    return markdown(("truth", *verdicts), rows)


def apis() -> str:
    """CPU time of the server for a token through each API, and the first token: medians of rounds, and their range."""
    run = record.load("api-cost", "random-llama-tiny")[-1]
    rows = []
    for way, label in _WAYS.items():
        many, few = ([row for row in run["rows"] if (row["way"], row["streams"]) == (way, count)] for count in (64, 8))
        cost_us = [row["cpu_s"] / row["tokens"] * 1e6 for row in many]
        together = statistics.median(row["tokens"] / row["pieces"] for row in many)
        first_ms = [row["first_ms"] for row in few]
        rows.append([label, _spread(cost_us, ".1f"), f"{together:.1f}", _spread(first_ms, ".1f")])
    return markdown(("", "us of CPU for a token", "tokens in a message", "first token, ms"), rows)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


TABLES = {
    "cost of the APIs": apis,
    "a served model": served,
    "memory of one step": mask_memory,
    "cost of a sweep": sweep,
    "how often tasks err": partial(gate_errors, _TASKS),
    "how often perplexity and speed err": partial(gate_errors, _OTHERS),
}
