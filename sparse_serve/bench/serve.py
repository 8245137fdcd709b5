"""`sparse-serve bench serve`: is a sparse model faster to its clients than its dense base?

Load comes from vLLM's own `vllm bench serve`, on random prompts of about the same length, with as many requests under
way as there are clients. A round serves both models, one after the other: two servers on one machine would take
caches and cores from each other. Who goes first changes from round to round, and what is compared is the ratio within a
round, so that a slow hour hits both. Prefix caching is off, as warming up repeats a prompt. A run in which a request
failed, or stopped early, is an error and not a figure.

Tokens per second while decoding are clients by time per output token, which leaves out the first token of a request and
with it the prompt.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from maskgen.core.files import read_json, write_json
from sparse_serve.bench.load import Load, bench_serve, serving
from sparse_serve.bench.record import facts
from sparse_serve.runtime import processes
from sparse_serve.runtime.errors import BenchError, SettingsError

MODELS = ("dense", "sparse")
_NEED_NOT_AGREE = {"quantization_config", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class Metric:
    """A figure of a run: its name in JSON, its title in the table, and which way is better."""

    name: str
    title: str
    more_is_better: bool


METRICS = (
    Metric("decode_tokens_per_s", "decode, tokens/s", True),
    Metric("output_tokens_per_s", "output, tokens/s", True),
    Metric("ttft_ms", "first token, ms", False),
    Metric("tpot_ms", "per token, ms", False),
)


@dataclass(frozen=True)
class Run:
    """One model under one load: the figures of `METRICS`, medians over requests, and all that vLLM reported."""

    model: str
    round: int
    clients: int
    figures: Mapping[str, float]
    vllm: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One metric under one load: medians over rounds, and how many times better sparse is in each round."""

    clients: int
    metric: Metric
    dense: float
    sparse: float
    ratios: Sequence[float]

    @property
    def ratio(self) -> float:
        """How many times better sparse is: the median over rounds. Below 1 it is worse."""
        return statistics.median(self.ratios)


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON. Returns 0; raises `BenchError` when a server or a run fails."""
    directories = {"dense": args.dense, "sparse": args.sparse}
    check(args.dense, args.sparse)
    processes.lead()  # servers end with this process however it ends
    flags = ["--dtype", args.dtype, "--no-enable-prefix-caching", *args.vllm_flags]
    loads = [Load(clients, args.requests, args.input_tokens, args.output_tokens) for clients in args.clients]
    runs: list[Run] = []
    with temporary() as work_dir:
        for number in range(args.rounds):
            for model in MODELS if number % 2 == 0 else MODELS[::-1]:
                runs += _serve(model, number, directories[model], flags, loads, work_dir)
    compared = compare(runs)
    Console().print(table(compared))
    if args.json:
        write_json(args.json, {**facts(), **_settings(args), **_results(runs, compared)})
    return 0


@contextmanager
def temporary() -> Iterator[Path]:
    """A temporary directory that stays when a child failed, as its log is there."""
    path, is_wanted = Path(tempfile.mkdtemp(prefix="sparse-serve-bench-")), False
    try:
        yield path
    except BenchError:
        is_wanted = True
        raise
    finally:
        if not is_wanted:
            shutil.rmtree(path)


def _serve(
    model: str, number: int, directory: Path, flags: Sequence[str], loads: Sequence[Load], work_dir: Path
) -> list[Run]:
    """Start the server of one model and put it under each load."""
    say, runs = Console(stderr=True).print, []
    say(f"round {number + 1}: starting the {model} server")
    with serving(directory, flags, work_dir) as url:
        for load in loads:
            vllm = bench_serve(url, directory, load, number, work_dir)
            runs.append(Run(model, number, load.clients, figures(vllm, load.clients), vllm))
            decode = runs[-1].figures["decode_tokens_per_s"]
            say(f"round {number + 1}: {model}, clients: {load.clients}, {decode:.1f} tokens/s decoding")
    return runs


def check(dense_dir: Path, sparse_dir: Path) -> None:
    """Raise `SettingsError` unless the directories are a dense and a sparse model of the same architecture."""
    dense, sparse = (read_json(directory / "config.json") for directory in (dense_dir, sparse_dir))
    if "quantization_config" in dense:
        raise SettingsError(f"--dense {dense_dir}: config.json has a quantization_config; expected a dense model")
    if "quantization_config" not in sparse:
        raise SettingsError(f"--sparse {sparse_dir}: config.json has no quantization_config; expected a sparse model")
    differing = {name for name in dense.keys() | sparse.keys() if dense.get(name) != sparse.get(name)}
    if differing - _NEED_NOT_AGREE:
        fields = ", ".join(sorted(differing - _NEED_NOT_AGREE))
        raise SettingsError(f"{dense_dir} and {sparse_dir} differ in {fields} of config.json; expected one model twice")


def figures(report: Mapping[str, Any], clients: int) -> dict[str, float]:
    """`METRICS` from a report of `vllm bench serve`."""
    return {
        "decode_tokens_per_s": clients * 1e3 / report["median_tpot_ms"],
        "output_tokens_per_s": report["output_throughput"],
        "ttft_ms": report["median_ttft_ms"],
        "tpot_ms": report["median_tpot_ms"],
    }


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Every metric under every load, dense against sparse, round by round."""
    compared = []
    for clients in dict.fromkeys(run.clients for run in runs):
        for metric in METRICS:
            dense, sparse = (
                {run.round: run.figures[metric.name] for run in runs if (run.model, run.clients) == (model, clients)}
                for model in MODELS
            )
            ratios = [sparse[number] / dense[number] for number in sorted(dense)]
            better = ratios if metric.more_is_better else [1 / ratio for ratio in ratios]
            medians = statistics.median(dense.values()), statistics.median(sparse.values())
            compared.append(Comparison(clients, metric, *medians, better))
    return compared


def table(compared: Sequence[Comparison]) -> Table:
    """A section per number of clients; where sparse is worse its ratio is red."""
    rounds = len(compared[0].ratios)
    title = f"a sparse model served against its dense base (rounds: {rounds})"
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("clients", "", "dense", "sparse", "better", "by round"):
        shown.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for row in compared:
        is_first = row.metric == METRICS[0]
        ratio = f"{row.ratio:.2f}x"
        lowest, highest = min(row.ratios), max(row.ratios)
        shown.add_row(
            str(row.clients) if is_first else "",
            row.metric.title,
            f"{row.dense:.1f}",
            f"{row.sparse:.1f}",
            f"[red]{ratio}[/red]" if row.ratio < 1 else ratio,
            f"{lowest:.2f} to {highest:.2f}" if rounds > 1 else "",
            end_section=row.metric == METRICS[-1],
        )
    return shown


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "requests", "input_tokens", "output_tokens", "rounds", "vllm_flags")
    return {
        "model": args.dense.resolve().name,
        "config": read_json(args.dense / "config.json"),
        **{name: getattr(args, name) for name in names},
    }


def _results(runs: Sequence[Run], compared: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "results": [
            {
                "clients": row.clients,
                "metric": row.metric.name,
                "dense": row.dense,
                "sparse": row.sparse,
                "ratio": row.ratio,
                "ratios": row.ratios,
            }
            for row in compared
        ],
        "runs": [vars(run) for run in runs],
    }
