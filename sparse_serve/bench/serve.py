"""Is a sparse model faster to its clients than its dense base?

    runs = run(ServeRequest(dense="DENSE", sparse="SPARSE"))
    compare(runs)

The load is vLLM's own `vllm bench serve`: random prompts of about the same length, as many requests at a time as there
are clients. A round serves both models, one after the other, because two servers on one machine would compete for cores
and caches. The order changes from round to round, and ratios are taken within a round, so that a slow hour affects both
models alike. Prefix caching is off, as the warm-up repeats a prompt. A request that fails or stops early is an error.

Decoding speed in tokens per second is the number of clients divided by the time per output token; the first token of a
request, which includes the prompt, does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from maskgen.core.checkpoint import check_directory, read_headers
from maskgen.core.companions import check_companions
from maskgen.core.config import CONFIG_KEY, WEIGHTS_KEY
from maskgen.core.digest import digest_weights
from maskgen.core.files import read_json
from sparse_serve.bench.record import run_metadata
from sparse_serve.runtime import environment, processes
from sparse_serve.runtime.errors import BenchError, SettingsError
from sparse_serve.runtime.load import Load, bench_serve, reason_of, serving, summary, temporary
from sparse_serve.runtime.request import Request

MODELS = ("dense", "sparse")
_NEED_NOT_AGREE = {CONFIG_KEY, WEIGHTS_KEY, "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class Metric:
    """A figure of a run: its name in JSON, its title in the table, and which way is better."""

    name: str
    title: str
    more_is_better: bool


Positive = Annotated[int, Field(ge=1)]

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


class ServeRequest(Request):
    """Which two models, under which loads. Raises `SettingsError` for a value out of range.

    Each of `clients` is a load: so many clients, each with `requests` requests one after the other. `vllm_flags` go to
    both servers. Every round serves both models.
    """

    dense: Path
    sparse: Path
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    clients: tuple[Positive, ...] = (1, 8)
    requests: Positive = 4
    input_tokens: Positive = 128
    output_tokens: Annotated[int, Field(ge=2)] = 128
    rounds: Positive = 3
    vllm_flags: tuple[str, ...] = ()


def run(
    request: ServeRequest,
    on_progress: Callable[[str], None] = lambda text: None,
    on_failure: Callable[[BenchError], None] = lambda error: None,
) -> list[Run]:
    """Serve both models in turn and put them under load; takes minutes.

    A server or a load that fails ends it: `on_failure` is called, and whole rounds before count. Raises that
    `BenchError` where there are none, `SettingsError` if the two are not a dense and a sparse form of one model. The
    environment of this process is left as it was.
    """
    check(request.dense, request.sparse)
    runs: list[Run] = []
    try:
        with environment.restored(), temporary("sparse-serve-bench-") as work_dir:
            processes.lead()  # servers end with this process however it ends
            for number in range(request.rounds):
                runs += _round(request, number, work_dir, on_progress)
    except BenchError as error:
        if not runs:
            raise
        on_failure(error)
    return runs


def _round(request: ServeRequest, number: int, work_dir: Path, on_progress: Callable[[str], None]) -> list[Run]:
    """Both models, each under every load; the order changes from round to round."""
    directories = {"dense": request.dense, "sparse": request.sparse}
    flags = ["--dtype", request.dtype, "--no-enable-prefix-caching", *request.vllm_flags]
    loads = [
        Load(clients, request.requests, request.input_tokens, request.output_tokens) for clients in request.clients
    ]
    runs = []
    for model in MODELS if number % 2 == 0 else MODELS[::-1]:
        on_progress(f"round {number + 1}: starting the {model} server")
        with serving(directories[model], flags, work_dir) as url:
            for load in loads:
                vllm = summary(bench_serve(url, directories[model], load, number, work_dir))
                runs.append(Run(model, number, load.clients, figures(vllm, load.clients), vllm))
                decode = runs[-1].figures["decode_tokens_per_s"]
                on_progress(f"round {number + 1}: {model}, clients: {load.clients}, {decode:.1f} tokens/s decoding")
    return runs


def check(dense_dir: Path, sparse_dir: Path) -> None:
    """Raise `SettingsError` unless the directories are a dense and a sparse model of the same architecture, and
    `FormatError` for a file that is missing or cut off."""
    for directory in (dense_dir, sparse_dir):
        check_directory(directory)
    dense, sparse = (read_json(directory / "config.json") for directory in (dense_dir, sparse_dir))
    if "quantization_config" in dense:
        raise SettingsError(f"--dense {dense_dir}: config.json has a quantization_config; expected a dense model")
    if "quantization_config" not in sparse:
        raise SettingsError(f"--sparse {sparse_dir}: config.json has no quantization_config; expected a sparse model")
    differing = {name for name in dense.keys() | sparse.keys() if dense.get(name) != sparse.get(name)}
    if differing - _NEED_NOT_AGREE:
        fields = ", ".join(sorted(differing - _NEED_NOT_AGREE))
        raise SettingsError(f"{dense_dir} and {sparse_dir} differ in {fields} of config.json; expected one model twice")
    for directory in (dense_dir, sparse_dir):  # a server would take a minute to find it
        read_headers(directory)
        check_companions(directory)


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


def record(request: ServeRequest, runs: Sequence[Run], failure: BenchError | None = None) -> dict[str, Any]:
    """What a result file holds: settings, versions, machine, comparisons and every figure of every run.

    `failure` is why there are fewer rounds than asked for.
    """
    names = ("dtype", "requests", "input_tokens", "output_tokens", "rounds", "vllm_flags")
    return {
        **run_metadata(),
        "inputs": {model: digest_weights(getattr(request, model)) for model in MODELS},
        "model": request.dense.resolve().name,
        "config": read_json(request.dense / "config.json"),
        **{name: getattr(request, name) for name in names},
        **({} if failure is None else {"failed": reason_of(failure)}),
        "results": [
            {
                "clients": row.clients,
                "metric": row.metric.name,
                "dense": row.dense,
                "sparse": row.sparse,
                "ratio": row.ratio,
                "ratios": row.ratios,
            }
            for row in compare(runs)
        ],
        "runs": [vars(run) for run in runs],
    }
